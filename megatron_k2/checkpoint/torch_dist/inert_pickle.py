"""Reads and writes pickles by the names in them: every class and function is an inert record.

``.metadata`` and torch.save's ``data.pkl`` are pickles; loading a stranger's with ``pickle`` runs
what it says, and importing torch to write one costs seconds. Here a global is a ``Record``
class named after it, which keeps its arguments and state and is written as it was read.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar


class Record:
    """What a pickled global was called with, and the state it was given."""

    qualified_name = ""
    place = ("", "")  # module and name
    made_by_call = True  # written as a call with its arguments, not as an object and its state

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


class Reference(tuple):
    """A persistent id: what a pickle says of something that is stored outside of it."""


@cache
def record_class(module: str, name: str) -> type[Record]:
    """Return the class that stands for a global; calling it is what calling the global would be."""
    return type(name, (Record,), {"qualified_name": f"{module}.{name}", "place": (module, name)})


def new_record(module: str, name: str, state: Any) -> Record:
    """Return an instance that is rebuilt without a call: ``cls.__new__(cls)`` and its state."""
    record = record_class(module, name)()
    record.state, record.made_by_call = state, False
    return record


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return record_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return Reference(pid) if isinstance(pid, tuple) else pid


def read_pickle(data: bytes) -> Any:
    """Return the pickled value with records in place of all classes and functions.

    Raises:
        ValueError: the bytes are no pickle.
    """
    try:
        return _InertUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # the unpickler raises whatever bad opcodes lead to
        raise ValueError(f"not a readable pickle ({type(error).__name__}: {error})") from error


class _Writer:
    """Protocol 2, the only one that torch.load(weights_only=True) reads.

    Equal strings and equal calls are written once.
    """

    def __init__(self) -> None:
        self.out = bytearray(pickle.PROTO + b"\x02")
        self._memo: dict[Any, bytes] = {}

    def write(self, value: Any) -> None:
        self._WRITERS[Record if isinstance(value, Record) else type(value)](self, value)

    def _again(self, key: Any) -> bool:
        """Refer to what was written before; tell whether it was."""
        code = self._memo.get(key)
        if code is not None:
            self.out += code
        return code is not None

    def _keep(self, key: Any) -> None:
        """Note what was written last."""
        place = len(self._memo).to_bytes(4, "little")
        self._memo[key] = pickle.LONG_BINGET + place
        self.out += pickle.LONG_BINPUT + place

    def _str(self, value: str) -> None:
        if not self._again(value):
            data = value.encode()
            self.out += pickle.BINUNICODE + len(data).to_bytes(4, "little") + data
            self._keep(value)

    def _global(self, value: type[Record]) -> None:
        if not self._again(value):
            self.out += pickle.GLOBAL + "{}\n{}\n".format(*value.place).encode()
            self._keep(value)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += pickle.BININT1 + bytes([value])
        elif -(1 << 31) <= value < 1 << 31:
            self.out += pickle.BININT + value.to_bytes(4, "little", signed=True)
        else:
            self.out += pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)

    def _bool(self, value: bool) -> None:
        self.out += pickle.NEWTRUE if value else pickle.NEWFALSE

    def _none(self, value: None) -> None:
        self.out += pickle.NONE

    def _tuple(self, value: tuple[Any, ...]) -> None:
        self.out += pickle.MARK
        for item in value:
            self.write(item)
        self.out += pickle.TUPLE

    def _list(self, value: list[Any]) -> None:
        self.out += pickle.EMPTY_LIST + pickle.MARK
        for item in value:
            self.write(item)
        self.out += pickle.APPENDS

    def _dict(self, value: dict[Any, Any]) -> None:
        self.out += pickle.EMPTY_DICT + pickle.MARK
        for key, item in value.items():
            self.write(key)
            self.write(item)
        self.out += pickle.SETITEMS

    def _reference(self, value: Reference) -> None:
        self._tuple(value)
        self.out += pickle.BINPERSID

    def _record(self, value: Record) -> None:
        if not value.made_by_call:
            self._global(type(value))
            self.out += pickle.EMPTY_TUPLE + pickle.NEWOBJ
            self.write(value.state)
            self.out += pickle.BUILD
        elif not self._again(key := (type(value), value.args)):
            self._global(type(value))
            self._tuple(value.args)
            self.out += pickle.REDUCE
            self._keep(key)

    _WRITERS: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        str: _str, int: _int, bool: _bool, type(None): _none, tuple: _tuple, list: _list,
        dict: _dict, Reference: _reference, Record: _record, type: _global,
    }  # fmt: skip


def write_pickle(value: Any) -> bytes:
    """Return a pickle in which records are the globals they are named after.

    Args:
        value: of str, int below 2^71, bool, None, tuple, list, dict, references, records and their
            classes; a cycle has no end.
    """
    writer = _Writer()
    writer.write(value)
    return bytes(writer.out + pickle.STOP)


def name_of(value: Any) -> str:
    """Return the qualified name of a record or of a record's class, '' for anything else."""
    found = getattr(value, "qualified_name", "")
    return found if isinstance(found, str) else ""
