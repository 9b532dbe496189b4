r"""A small procedural set of mathematics, so that the environment works without a file.

Ten families, each with its answer by construction and in LaTeX: whole numbers, fractions, sets,
intervals, pairs and polynomials. They show that the checker reads these forms; they are no
curriculum, for which ``read_problems`` takes public sets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb

Row = dict[str, object]


def problems(seed: int) -> Iterator[dict]:
    """Yield problems without end: ``problem``, ``answer``, ``tags``, and ``form`` where it counts.

    Families take turns; each has its own stream.
    """
    streams = {name: random.Random(f"{name} {seed}") for name in _FAMILIES}
    while True:
        for name, family in _FAMILIES.items():
            problem, answer = family(streams[name])
            yield {
                "problem": problem,
                "answer": answer,
                "tags": [f"topic:{name}"],
                "form": "expanded" if name in ("expansion", "derivative") else "",
            }


def latex(number: Fraction | int) -> str:
    """Return a number as LaTeX."""
    number = Fraction(number)
    if number.denominator == 1:
        return str(number.numerator)
    sign = "-" if number < 0 else ""
    return f"{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def polynomial(coefficients: list[int], name: str = "x") -> str:
    """Return a polynomial, not zero, as LaTeX; the coefficient of the highest power is first."""
    text = ""
    for place, value in enumerate(coefficients):
        power = len(coefficients) - 1 - place
        if value == 0:
            continue
        sign = "-" if value < 0 else "+" if text else ""
        size = "" if abs(value) == 1 and power else str(abs(value))
        variable = "" if power == 0 else name if power == 1 else f"{name}^{{{power}}}"
        text += f"{sign}{size}{variable}"
    return text


def _not_zero(rng: random.Random, size: int) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, size)


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b, c, d = (rng.randint(12, 99) for _ in range(4))
    return f"Compute ${a} \\times {b} - {c} \\times {d}$.", str(a * b - c * d)


def _fractions(rng: random.Random) -> tuple[str, str]:
    one, other = (Fraction(rng.randint(1, 30), rng.randint(2, 30)) for _ in range(2))
    return f"Compute ${latex(one)} + {latex(other)}$ in lowest terms.", latex(one + other)


def _linear(rng: random.Random) -> tuple[str, str]:
    a, c = rng.sample(range(2, 20), 2)
    b, d = _not_zero(rng, 60), _not_zero(rng, 60)
    sides = f"{polynomial([a, b])} = {polynomial([c, d])}"
    return f"Solve ${sides}$ for $x$.", latex(Fraction(d - b, a - c))


def _quadratic(rng: random.Random) -> tuple[str, str]:
    one, other = sorted(rng.sample(range(-20, 21), 2))
    equation = polynomial([1, -(one + other), one * other])
    return f"Find the set of all solutions of ${equation} = 0$.", f"\\{{{one}, {other}\\}}"


def _inequality(rng: random.Random) -> tuple[str, str]:
    low, high = sorted(rng.sample(range(-20, 21), 2))
    left = polynomial([1, -(low + high), low * high])
    if rng.random() < 0.5:
        return f"Solve ${left} < 0$; give an interval.", f"({low}, {high})"
    return f"Solve ${left} \\le 0$; give an interval.", f"[{low}, {high}]"


def _expansion(rng: random.Random) -> tuple[str, str]:
    a, b, c = rng.randint(2, 9), _not_zero(rng, 12), _not_zero(rng, 12)
    problem = f"Expand $({polynomial([a, b])})({polynomial([1, c])})$."
    return problem, polynomial([a, a * c + b, b * c])


def _derivative(rng: random.Random) -> tuple[str, str]:
    values = [_not_zero(rng, 9) for _ in range(4)]
    a, b, c, _ = values
    return f"Differentiate ${polynomial(values)}$.", polynomial([3 * a, 2 * b, c])


def _system(rng: random.Random) -> tuple[str, str]:
    x, y = _not_zero(rng, 30), _not_zero(rng, 30)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    problem = f"Solve $x + {a}y = {x + a * y}$ and ${b}x - {c}y = {b * x - c * y}$; give $(x, y)$."
    return problem, f"({x}, {y})"


def _series(rng: random.Random) -> tuple[str, str]:
    first, step, count = rng.randint(1, 40), rng.randint(2, 15), rng.randint(12, 60)
    last = first + step * (count - 1)
    text = f"{first} + {first + step} + {first + 2 * step} + \\dots + {last}"
    return f"Compute ${text}$.", str((first + last) * count // 2)


def _chance(rng: random.Random) -> tuple[str, str]:
    red, blue, drawn = rng.randint(3, 12), rng.randint(3, 12), rng.randint(2, 3)
    problem = (
        f"A bag holds {red} red and {blue} blue balls. {drawn} are drawn without putting back. "
        "With what probability are all of them red? Give a fraction in lowest terms."
    )
    return problem, latex(Fraction(comb(red, drawn), comb(red + blue, drawn)))


_FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "fractions": _fractions,
    "linear": _linear,
    "quadratic": _quadratic,
    "inequality": _inequality,
    "expansion": _expansion,
    "derivative": _derivative,
    "system": _system,
    "series": _series,
    "chance": _chance,
}
