"""Loss as a function of training FLOPs and sparsity: the law, its fit and its inverse.

    L(C, S) = E + exp(a - b c + g x + h x^2 + k c x),   c = ln(C / C0), x = ln(S / S0)

C are training FLOPs (shapes.py), S is sparsity, C0 and S0 the middle and the smallest of the data,
E the loss that no compute removes. A form keeps some terms: `flat` none of x, `power` g (then
FLOPs at equal loss go as S^(g/b)), `curved` g and h, `tilted` g and k (the exponent depends on
sparsity). E is 0 as in Moonlight's law (arXiv 2502.16982, section 3.2) unless it is asked for: over
a few octaves of C it cannot be told from b, and is no more than the curve's bend there. One
sparsity and `flat` is a plain power law.

Points are means over seeds. Intervals are in uncertainty.py. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMS = {"flat": "", "power": "g", "curved": "gh", "tilted": "gk"}
_STEPS = 300  # of the least squares
_ENOUGH = 1e-7  # relative gain of a step below which they end
_STARTS = (0.3, 0.8)  # of E, in the lowest loss
_LARGEST_LOG = 600.0  # of FLOPs over C0: a double ends at e^709


@dataclass(frozen=True)
class Point:
    """One cell of a grid: its mean loss over seeds, in any unit that all points share."""

    flops: float
    sparsity: float
    loss: float


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        form: of FORMS.
        theta: a, -b, then the form's terms, [p]; ln E at the end where it was fitted.
        fixed_floor: E where it was given, None where theta ends in ln E.
        flops0: C0.
        sparsity0: S0.
    """

    form: str
    theta: np.ndarray
    fixed_floor: float | None
    flops0: float
    sparsity0: float

    @property
    def floor(self) -> float:
        """E."""
        return math.exp(self.theta[-1]) if self.fixed_floor is None else self.fixed_floor

    @property
    def exponent(self) -> float:
        """b, at the smallest sparsity."""
        return -float(self.theta[1])

    @property
    def coefficient(self) -> float:
        """The A of L = E + A C^-b at the smallest sparsity, C in the unit of the points."""
        return math.exp(self.theta[0] + self.exponent * math.log(self.flops0))

    def loss(self, flops: Any, sparsity: Any) -> Any:
        """Return the loss; arguments may be arrays."""
        return np.exp(log_loss(self.theta, self, np.asarray(flops), np.asarray(sparsity)))

    def flops_for(self, loss: float, sparsity: float) -> float:
        """Return the FLOPs at which a sparsity reaches a loss; infinite where more do not help.

        Raises:
            ValueError: no amount of compute does.
        """
        if loss <= self.floor:
            raise ValueError(f"--loss {loss:g} must be above the fitted floor {self.floor:.4f}")
        x = math.log(sparsity / self.sparsity0)
        without = terms_of(self.form, np.zeros(1), np.array([x]))[0]
        slope = terms_of(self.form, np.ones(1), np.array([x]))[0] - without
        theta = self.theta[: len(without)]
        if slope @ theta >= 0:
            return math.inf
        log_c = (math.log(loss - self.floor) - without @ theta) / (slope @ theta)
        return self.flops0 * math.exp(min(log_c, _LARGEST_LOG))

    def flops_ratio(self, loss: float, sparsity: float, other: float) -> float:
        """Return how many times the FLOPs of `sparsity` the other one needs for a loss."""
        return self.flops_for(loss, other) / self.flops_for(loss, sparsity)


def terms_of(form: str, c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the design matrix [points, terms]."""
    columns = {"g": x, "h": x * x, "k": c * x}
    return np.stack([np.ones_like(c), c, *(columns[term] for term in FORMS[form])], axis=-1)


def log_loss(theta: np.ndarray, law: Law, flops: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    """Return ln L of parameters that need not be the law's own."""
    c, x = np.broadcast_arrays(np.log(flops / law.flops0), np.log(sparsity / law.sparsity0))
    terms = terms_of(law.form, c, x)
    power = terms @ theta[: terms.shape[-1]]
    if law.fixed_floor is None:
        return np.logaddexp(power, theta[-1])
    return np.logaddexp(power, math.log(law.fixed_floor)) if law.fixed_floor else power


def fit(points: Sequence[Point], form: str = "power", floor: float | None = 0.0) -> Law:
    """Fit a law by least squares in ln L.

    Args:
        points: of any number of sparsities.
        form: of FORMS.
        floor: E; None fits it.

    Raises:
        ValueError: too few or unusable points, or an E above one of them.
    """
    _check(points, form, floor)
    flops, sparsity, loss = (
        np.array([getattr(point, name) for point in points])
        for name in ("flops", "sparsity", "loss")
    )
    law = Law(
        form, np.zeros(0), floor, float(np.exp(np.log(flops).mean())), float(sparsity.min())
    )  # fmt: skip
    starts = [floor] if floor is not None else [loss.min() * share for share in _STARTS]
    terms = terms_of(form, np.log(flops / law.flops0), np.log(sparsity / law.sparsity0))
    found = []
    for start in starts:
        theta = np.linalg.lstsq(terms, np.log(loss - start), rcond=None)[0]
        if floor is None:
            theta = np.append(theta, math.log(start))
        found.append(descend(theta, law, flops, sparsity, np.log(loss)))
    best = min(found, key=lambda item: item[1])[0]
    return Law(form, best, floor, law.flops0, law.sparsity0)


def _check(points: Sequence[Point], form: str, floor: float | None) -> None:
    if form not in FORMS:
        raise ValueError(f"--form {form} must be one of {', '.join(FORMS)}")
    numbers = [value for p in points for value in (p.flops, p.sparsity, p.loss)]
    if any(not math.isfinite(value) or value <= 0 for value in numbers):
        raise ValueError("FLOPs, sparsities and losses must be finite and above 0")
    sparsities = {point.sparsity for point in points}
    wanted = {"flat": 1, "power": 2, "curved": 3, "tilted": 2}[form]
    if len(sparsities) < wanted:
        raise ValueError(f"--form {form} needs {wanted} sparsities, found {len(sparsities)}")
    free = num_parameters(form, floor)
    if len(points) < free or len({p.flops for p in points}) < (2 if floor is not None else 3):
        raise ValueError(
            f"--form {form} has {free} parameters and too few points of other FLOPs: {len(points)}"
        )
    if floor and floor >= min(point.loss for point in points):
        raise ValueError(f"--floor {floor:g} must be below every loss")


def num_parameters(form: str, floor: float | None) -> int:
    """Return how many numbers a fit chooses."""
    return 2 + len(FORMS[form]) + (floor is None)


def descend(
    theta: np.ndarray, law: Law, flops: np.ndarray, sparsity: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the parameters that fit best and the sum of squares of ln L.

    Without E the problem is linear; with it, Levenberg and Marquardt's steps from `theta`.
    """
    if law.fixed_floor == 0:
        terms = terms_of(law.form, np.log(flops / law.flops0), np.log(sparsity / law.sparsity0))
        theta = np.linalg.lstsq(terms, target, rcond=None)[0]
        residual = target - terms @ theta
        return theta, float(residual @ residual)
    damping = 1e-6
    residual = target - log_loss(theta, law, flops, sparsity)
    for _ in range(_STEPS):
        jacobian = jacobian_of(theta, law, flops, sparsity)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(
            normal + damping * np.diag(np.diag(normal) + 1e-12), jacobian.T @ residual
        )  # fmt: skip
        trial = target - log_loss(theta + step, law, flops, sparsity)
        if trial @ trial <= residual @ residual:
            done = residual @ residual - trial @ trial <= _ENOUGH * (residual @ residual)
            theta, residual, damping = theta + step, trial, damping / 10
            if done:
                break
        elif damping > 1e8:  # no direction leads down
            break
        else:
            damping *= 10
    return theta, float(residual @ residual)


def jacobian_of(theta: np.ndarray, law: Law, flops: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    """Return d ln L / d theta, [points, parameters]."""
    terms = terms_of(law.form, np.log(flops / law.flops0), np.log(sparsity / law.sparsity0))
    total = log_loss(theta, law, flops, sparsity)
    share = np.exp(terms @ theta[: terms.shape[-1]] - total)[:, None]  # of L above E
    if law.fixed_floor is None:
        return np.hstack([terms * share, np.exp(theta[-1] - total)[:, None]])
    return terms * share


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other of their sparsity beats with as few FLOPs or fewer.

    For grids with several token budgets a size: what remains approximates compute-optimal runs.
    """
    return [
        point
        for point in points
        if not any(
            other.sparsity == point.sparsity
            and other.flops <= point.flops
            and other.loss < point.loss
            for other in points
        )
    ]
