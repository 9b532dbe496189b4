"""Quantities of physics, chemistry and biology, with the formula known and the numbers drawn.

Constants are in the questions, so that the answer rests on nothing else; one per cent is allowed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_TOLERANCE = 0.01  # of rounding; a wrong formula is farther off
_WEIGHTS = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999, "Na": 22.990, "S": 32.06}


def science(rng: random.Random) -> dict[str, Any]:
    """Return a question with a number as its answer."""
    question, value = rng.choice(_TEMPLATES)(rng)
    return {
        "question": f"{question} Answer with the number alone.",
        "answer": f"{value:.6g}",
        "tolerance": _TOLERANCE,
    }


def _braking(rng: random.Random) -> tuple[str, float]:
    speed, slowing = rng.randint(8, 45), rng.randint(2, 9)
    text = f"A car at {speed} m/s brakes at {slowing} m/s^2. How many metres until it stands?"
    return text, speed**2 / (2 * slowing)


def _circuit(rng: random.Random) -> tuple[str, float]:
    volts, one, two, three = rng.randint(5, 240), *(rng.randint(2, 90) for _ in range(3))
    current = volts / (one + two * three / (two + three))
    text = (
        f"A {volts} V source feeds {one} ohm in series with a parallel pair of {two} and {three} "
        "ohm. What is the total current in amperes?"
    )
    return text, current


def _molar_mass(rng: random.Random) -> tuple[str, float]:
    parts = {name: rng.randint(1, 12) for name in rng.sample(sorted(_WEIGHTS), 3)}
    formula = "".join(f"{name}{count if count > 1 else ''}" for name, count in parts.items())
    weights = ", ".join(f"{name} {_WEIGHTS[name]}" for name in parts)
    grams = rng.randint(5, 500)
    mass = sum(_WEIGHTS[name] * count for name, count in parts.items())
    return f"How many moles are {grams} g of {formula}? Atomic weights: {weights}.", grams / mass


def _dilution(rng: random.Random) -> tuple[str, float]:
    strong, weak, volume = rng.randint(5, 18), rng.randint(1, 4), rng.randint(50, 2000)
    text = (
        f"How many mL of a {strong} mol/L stock give {volume} mL of a {weak / 10} mol/L solution?"
    )
    return text, weak / 10 * volume / strong


def _half_life(rng: random.Random) -> tuple[str, float]:
    life, start, halves = rng.randint(2, 60), rng.randint(2, 90) * 16, rng.randint(2, 4)
    text = (
        f"A sample of {start} g decays with a half-life of {life} days. How many grams are left "
        f"after {life * halves} days?"
    )
    return text, start / 2**halves


def _carriers(rng: random.Random) -> tuple[str, float]:
    share, people = rng.randint(1, 40), rng.randint(2, 90) * 1000
    recessive = share / 100
    text = (
        f"A recessive allele has frequency {recessive} in a population of {people} in "
        "Hardy-Weinberg equilibrium. How many heterozygotes are expected?"
    )
    return text, 2 * recessive * (1 - recessive) * people


def _heat(rng: random.Random) -> tuple[str, float]:
    grams, degrees = rng.randint(20, 900), rng.randint(3, 70)
    text = (
        f"How many joules warm {grams} g of water by {degrees} K? Its specific heat is "
        "4.18 J/(g K)."
    )
    return text, 4.18 * grams * degrees


_TEMPLATES: tuple[Callable[[random.Random], tuple[str, float]], ...] = (
    _braking,
    _circuit,
    _molar_mass,
    _dilution,
    _half_life,
    _carriers,
    _heat,
)
