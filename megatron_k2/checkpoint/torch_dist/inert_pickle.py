"""Reads pickles without running anything in them: every class and function becomes an inert record.

``.metadata`` and torch.save's ``data.pkl`` are pickles; loading a stranger's with ``pickle`` runs
what it says, and with torch it costs 2 s and 300 MB in every worker. Here a global becomes a
``Record`` class named after it, which keeps its arguments and state.
"""

from __future__ import annotations

import collections
import io
import pickle
from functools import cache
from typing import Any


class Record:
    """What a pickled global was called with, and the state it was given."""

    qualified_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Keep the arguments; nothing is called."""
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


@cache
def _record_class(module: str, name: str) -> type[Record]:
    return type(name, (Record,), {"qualified_name": f"{module}.{name}"})


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return _record_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_pickle(data: bytes) -> Any:
    """Return the pickled value with records in place of all classes and functions.

    Raises:
        ValueError: the bytes are no pickle.
    """
    try:
        return _InertUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # the unpickler raises whatever bad opcodes lead to
        raise ValueError(f"not a readable pickle ({type(error).__name__}: {error})") from error


def name_of(value: Any) -> str:
    """Return the qualified name of a record or of a record's class, '' for anything else."""
    found = getattr(value, "qualified_name", "")
    return found if isinstance(found, str) else ""
