"""The game of 24: four numbers and + - * / make 24, each number used once.

reasoning-gym's scorer takes any four numbers in range, so that one answer is right everywhere, and
evaluates what it is given; here the numbers must be the puzzle's, and nothing is evaluated that is
not a number, a bracket or one of the four signs.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

TARGET = 24
_MAX_LENGTH = 60  # characters of an answer; four numbers and brackets need half
_SIGNS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SHAPES = (  # of numbers 0 to 3 and signs 4 to 6
    "(({0} {4} {1}) {5} {2}) {6} {3}",
    "({0} {4} ({1} {5} {2})) {6} {3}",
    "({0} {4} {1}) {5} ({2} {6} {3})",
    "{0} {4} (({1} {5} {2}) {6} {3})",
    "{0} {4} ({1} {5} ({2} {6} {3}))",
)


def twenty_four(rng: random.Random, max_value: int = 13) -> dict[str, Any]:
    """Return a puzzle that has a solution: a random expression whose last number makes it 24."""
    solution = None
    while solution is None:
        shape, signs = rng.choice(_SHAPES), rng.choices("+-*/", k=3)
        given = [rng.randint(1, max_value) for _ in range(3)]
        place = rng.randrange(4)
        for last in range(1, max_value + 1):
            numbers = [*given[:place], last, *given[place:]]
            expression = shape.format(*numbers, *signs)
            if _makes_target(expression, numbers):
                solution = expression
                break
    rng.shuffle(numbers)
    shown = ", ".join(map(str, numbers))
    return {
        "question": f"Make {TARGET} from {shown}: use each number exactly once, with + - * / and "
        "brackets. Answer with the expression alone.",
        "answer": solution,
        "numbers": numbers,
    }


def is_solution(entry: Mapping[str, Any], answer: str) -> bool:
    """Return whether an expression makes 24 of the puzzle's numbers."""
    return len(answer) <= _MAX_LENGTH and _makes_target(answer.strip(), entry["numbers"])


def _makes_target(expression: str, numbers: Sequence[int]) -> bool:
    used: list[int] = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return False
    return value == TARGET and sorted(used) == sorted(numbers)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _SIGNS:
            result: Fraction = _SIGNS[type(sign)](_value(left, used), _value(right, used))
            return result
    raise ValueError(f"{ast.dump(node)} is no part of a solution")
