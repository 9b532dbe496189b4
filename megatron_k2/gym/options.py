"""Options of an environment's ``load``: known by name, and of the type that it declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GIVEN = ("split", "num_tasks", "seed")  # arguments of ``load`` that are no options
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "Sequence[str]": (str,),
    "Sequence[int]": (int,),
}


def check_options(load: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check the options that a run file or a command line gives.

    Args:
        load: of the environment; its annotations say what an option is, as far as they are plain.
        options: by name.

    Raises:
        ValueError: one is unknown, or of another type.
    """
    known = inspect.signature(load).parameters
    names = [name for name in known if name not in GIVEN]
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        names += sorted(set(options) - set(GIVEN))
    if unknown := sorted(set(options) - set(names)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(names) or '(none)'}")
    for name, value in options.items():
        declared = known[name].annotation if name in known else ""
        kind = declared if isinstance(declared, str) else getattr(declared, "__name__", "")
        if kind in _KINDS and not _is(value, kind):
            wanted = kind.replace("Sequence[", "list[")
            raise ValueError(f"{name} = {value!r} is no {wanted}")


def _is(value: Any, kind: str) -> bool:
    many = kind.startswith("Sequence")
    if many and (isinstance(value, str) or not isinstance(value, Sequence)):
        return False
    kinds = _KINDS[kind]
    return all(
        isinstance(one, kinds) and (bool in kinds or not isinstance(one, bool))
        for one in (value if many else [value])
    )
