"""All rules by kind; instructions are checked and stated here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from megatron_k2.gym.instructions.format_rules import FORMAT_RULES
from megatron_k2.gym.instructions.length_rules import LENGTH_RULES
from megatron_k2.gym.instructions.place_rules import PLACE_RULES
from megatron_k2.gym.instructions.plan import Plan
from megatron_k2.gym.instructions.rule import Instruction, Rule
from megatron_k2.gym.instructions.word_rules import WORD_RULES

RULES: dict[str, Rule] = {
    rule.kind: rule for rule in (*LENGTH_RULES, *WORD_RULES, *FORMAT_RULES, *PLACE_RULES)
}


def instruction(value: dict[str, Any]) -> Instruction:
    """Return the instruction of a task's metadata.

    Raises:
        ValueError: no such kind, or parameters that its check does not take.
    """
    kind, params = value.get("kind"), value.get("params", {})
    if kind not in RULES:
        raise ValueError(f"kind {kind!r} is none of {', '.join(sorted(RULES))}")
    try:
        RULES[kind].check("", **params)
        RULES[kind].state(**params)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"kind {kind}: parameters {params}: {error}") from error
    return Instruction(kind, params)


def holds(asked: Instruction, text: str) -> bool:
    """Return whether an answer follows an instruction; an empty one follows none."""
    return bool(text.strip()) and bool(RULES[asked.kind].check(text, **asked.params))


def stated(asked: Instruction) -> str:
    """Return an instruction in words."""
    return str(RULES[asked.kind].state(**asked.params))


def is_passive(asked: Instruction) -> bool:
    """Return whether most texts follow an instruction without trying, short ones above all."""
    return RULES[asked.kind].passive or asked.params.get("relation") in ("less than", "at most")


def are_apart(first: str, second: str) -> bool:
    """Return whether two kinds are not combined."""
    return second in RULES[first].apart.split() or first in RULES[second].apart.split()


def fit_together(kinds: Sequence[str]) -> bool:
    """Return whether kinds may be combined: no two apart, each once, one that is not passive."""
    return (
        len(set(kinds)) == len(kinds)
        and not any(are_apart(first, second) for first, second in combinations(kinds, 2))
        and not all(RULES[kind].passive for kind in kinds)
    )


def plan_of(asked: Sequence[Instruction]) -> Plan:
    """Return what a gold answer to instructions needs.

    Raises:
        Unsatisfiable: they contradict each other.
    """
    plan = Plan()
    for one in asked:
        RULES[one.kind].plan(plan, **one.params)
    return plan
