"""The dataset index helper: use the compiled one that the wheel ships.

Upstream runs ``make`` in its own folder at start-up. The wheel has no Makefile there and brings
the compiled extension instead, so the call ends the process with "Failed to compile". A checkout
has the Makefile, which needs pybind11 and a compiler; with the wheel installed beside it, the
wheel's extension of the same source serves the checkout too.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_k2 import compat
from megatron_k2.patches.patch import Patch

_PACKAGE = "megatron.core.datasets"


def _replacement(original: Callable[[], None]) -> Any:
    _borrow_from_the_wheel()

    def compile_helpers() -> None:
        """Compile the C++ helper only where no compiled one is found."""
        if importlib.util.find_spec(f"{_PACKAGE}.helpers_cpp") is None:
            original()

    return compile_helpers


def _borrow_from_the_wheel() -> None:
    """Let the datasets package of a checkout find the wheel's extension, on every rank."""
    if importlib.util.find_spec(f"{_PACKAGE}.helpers_cpp") is None:
        folder = compat.wheel_folder(_PACKAGE)
        if folder is not None:
            sys.modules[_PACKAGE].__path__.append(str(folder))


def _still_needed() -> bool:
    """The wheel still ships no Makefile and upstream still calls make."""
    original = PATCH.original()
    folder = Path(inspect.getfile(original)).parent
    return not (folder / "Makefile").exists() and "make" in inspect.getsource(original)


PATCH = Patch(
    id="compile-helpers",
    target="megatron.core.datasets.utils:compile_helpers",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="84029a50ae8c",
    why="start-up runs make in the wheel's folder, where there is no Makefile",
    upstream="megatron/core/datasets/utils.py:20",
    remove_when="upstream looks for the compiled helper first",
    still_needed=_still_needed,
    importers=("megatron.core.datasets",),
)
