"""Update rules by name: Muon's own, and those of others.

A rule is a callable with ``scale`` and ``flops`` (``directions.UpdateRule``) that turns momenta,
whole matrix by whole matrix, into directions. What it gets for it: homes and point-to-point
exchange, tensor parallelism that does not change the result, QK-Clip, state by name, telemetry and
the tests of layouts (``tests/distributed/test_muonclip.py`` takes the rule's name). One file does::

    from megatron_k2.optimizer.rules import register_rule

    @register_rule("sign")
    class Sign:
        def __init__(self, config): ...
        def __call__(self, momenta): return momenta.sign()
        def scale(self, rows, columns): return 0.2
        def flops(self, rows, columns): return rows * columns

and ``--k2-muon-rule my_package.sign:sign`` imports the module before the name is looked up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_k2.optimizer.directions import UpdateRule

RuleFactory = Callable[[Any], UpdateRule]
"""From a ``MuonClipConfig`` to the rule."""

_RULES: dict[str, RuleFactory] = {}


def register_rule(name: str) -> Callable[[RuleFactory], RuleFactory]:
    """Return a decorator that makes a class or function the rule of that name.

    Raises:
        ValueError: another rule has the name.
    """

    def register(factory: RuleFactory) -> RuleFactory:
        if _RULES.get(name, factory) is not factory:
            raise ValueError(f"update rule {name!r} is registered already: {_RULES[name]}")
        _RULES[name] = factory
        return factory

    return register


def load_rule(name: str) -> RuleFactory:
    """Return the rule of a name, ``name`` or ``module:name``.

    Raises:
        ValueError: unknown name, or there is no such module.
    """
    module, _, plain = name.rpartition(":")
    if module:
        _import(module)
    if plain not in _RULES:
        known = ", ".join(sorted(_RULES))
        raise ValueError(
            f"--k2-muon-rule {name!r} is not one of {known}; give MODULE:NAME for one of your own"
        )
    return _RULES[plain]


def _import(module: str) -> None:
    """Import a user's module; errors inside it keep their own traceback."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"--k2-muon-rule: there is no module {error.name!r}; is its folder in PYTHONPATH?"
        ) from error
