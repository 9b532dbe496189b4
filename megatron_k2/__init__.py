"""Kimi K2 training as an extension of an unmodified Megatron-Core 0.19.

Importing this package, or any module of it, changes nothing upstream; ``register()`` does, once and
explicitly. From a checkout that is not installed the folder ``patches/`` beside this package is
``megatron_k2.patches``, as it is in the wheel.
"""

import sys
from pathlib import Path
from typing import Any

if sys.version_info < (3, 12):  # noqa: UP036  before an import that an older one lacks
    raise ImportError(
        f"megatron_k2 needs Python 3.12 or newer, this is {sys.version.split()[0]} "
        f"({sys.executable}); `make setup` finds one and installs everything into .venv"
    )

__version__ = "0.1.0"
__all__ = ["__version__", "register"]

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "patches" / "patch.py").is_file():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    """Load ``register`` on first use: importing the package imports no torch and no megatron."""
    if name == "register":
        from megatron_k2.registration import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
