"""Packages of the extra ``data``: imported when a file or a flag needs them, named when missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, wanted_by: str) -> ModuleType:
    """Import a package of the extra.

    Args:
        module: what to import.
        wanted_by: the flag or the file that needs it, for the message.

    Raises:
        ValueError: it is not installed, or does not load; the message has the install line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{wanted_by} needs the package {package} ({error}): pip install 'megatron-k2[data]'"
        ) from error


def json_loads() -> object:
    """Return the fastest JSON parser there is."""
    try:
        return importlib.import_module("orjson").loads
    except ImportError:
        return importlib.import_module("json").loads
