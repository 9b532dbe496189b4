"""What a rule is: a check, its wording, its parameters, and what a gold answer needs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A kind of instruction. All functions are pure; parameters are JSON.

    Attributes:
        kind: its name.
        check: of an answer and the parameters, by name: whether it holds.
        state: of the parameters: the instruction in words.
        draw: of a random generator and the request that the answer is for: parameters.
        plan: of a plan and the parameters: writes down what a gold answer needs.
        apart: kinds, with spaces between them, that it is not combined with: they contradict each
            other, or no gold answer to both can be made here.
        passive: most texts follow it without trying, whatever the parameters.
        ifeval: IFEval's name of the same kind; "" where it has none.
        differs: where the check decides otherwise than IFEval's.
    """

    kind: str
    check: Callable[..., bool]
    state: Callable[..., str]
    draw: Callable[[Random, str], dict[str, Any]]
    plan: Callable[..., None]
    apart: str = ""
    passive: bool = False
    ifeval: str = ""
    differs: str = ""


@dataclass(frozen=True)
class Instruction:
    """A rule with its parameters."""

    kind: str
    params: Params

    def as_json(self) -> dict[str, Any]:
        """Return it as a task's metadata has it."""
        return {"kind": self.kind, "params": dict(self.params)}
