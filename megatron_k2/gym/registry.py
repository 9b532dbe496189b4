"""Environments by name: ours, and those that other packages bring as entry points.

A package adds one with an entry point of the group ``megatron_k2.environments``, ``name =
package.module:Class``; its class is imported when the name is asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from megatron_k2.compat import entry_points
from megatron_k2.gym.base import Environment

GROUP = "megatron_k2.environments"
OURS: dict[str, str] = {}


@cache
def known() -> dict[str, str]:
    """Return name -> ``module:Class`` of every environment that is installed.

    Raises:
        ValueError: two packages bring the same name.
    """
    found = dict(OURS)
    for name, value in entry_points(GROUP):
        if found.get(name, value) != value:
            raise ValueError(f"environment {name!r} is both {found[name]} and {value}")
        found[name] = value
    return found


def environment(name: str) -> type[Environment]:
    """Return the class of an environment.

    Raises:
        ValueError: no such name; lists those that there are.
        ImportError: a package that it needs is missing.
    """
    if name not in known():
        raise ValueError(f"environment {name!r} is none of {', '.join(sorted(known()))}")
    module, _, attribute = known()[name].partition(":")
    found: type[Environment] = getattr(import_module(module), attribute)
    return found
