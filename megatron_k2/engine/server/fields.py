"""Fields of a JSON request, checked: what is missing, of a wrong kind, out of range or not known.

A field that the server does not know is refused and not passed over, as it may change what the
client gets; null is the same as a field left out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_k2.engine.server.errors import ApiError

_ABSENT = object()
MOST_ID = 1 << 31  # beyond every vocabulary


class Fields:
    """A request's fields, each read at most once.

    Args:
        body: of the request.

    Raises:
        ApiError: it is no object.
    """

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field of any kind, ``default`` if it is left out."""
        return self._left.pop(name, default)

    def text(self, name: str) -> str:
        """Return a field that must be there and be text."""
        value = self.take(name, _ABSENT)
        if value is _ABSENT:
            raise ApiError(400, f"{name} is missing", name)
        if not isinstance(value, str):
            raise wrong(name, value, "text")
        return value

    def flag(self, name: str) -> bool:
        """Return a field that is true or false; false if it is left out."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        """Return a whole number of a range."""
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """Return a number of a range."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        if not least <= value <= most:  # false for NaN
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return a field that is a text or a list of at most so many; none may be empty."""
        value = self.take(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise wrong(name, value, "a text that is not empty, or a list of them")
        if len(values) > most:
            raise ApiError(400, f"{name}: {len(values)} given, at most {most} are allowed", name)
        return tuple(values)

    def ids(self, name: str) -> tuple[int, ...]:
        """Return a field that is a list of token ids."""
        value = self.take(name, [])
        if not is_ids(value) or max(value, default=0) >= MOST_ID:
            raise wrong(name, value, "a list of token ids")
        return tuple(value)

    def only(self, name: str, allowed: Collection[Any], why: str) -> None:
        """Refuse a field unless it says what happens anyway.

        Args:
            name: of the field.
            allowed: its values that change nothing.
            why: the server does not do what others ask.
        """
        value = self.take(name, _ABSENT)
        kinds = {type(one) is bool for one in allowed}
        if value is not _ABSENT and (value not in allowed or (type(value) is bool) not in kinds):
            raise ApiError(400, f"{name} {_shown(value)}: {why}", name, "unsupported")

    def end(self, ignored: Collection[str]) -> None:
        """Refuse what was not read.

        Args:
            ignored: fields that ask nothing of the answer.
        """
        for name in self._left:
            if name not in ignored:
                raise ApiError(400, f"{name} is not known to this server", name, "unknown_field")


def is_ids(value: Any) -> bool:
    """Return whether a value is a list of token ids."""
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
    )


def wrong(name: str, value: Any, wanted: str, field: str = "") -> ApiError:
    """Return the error of a field of a wrong value; ``field`` where ``name`` is a place in one."""
    return ApiError(400, f"{name} {_shown(value)}: wanted {wanted}", field or name)


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return shown if len(shown) <= 60 else shown[:57] + "..."
