"""What a scaling grid says: the law, FLOPs saved at equal loss, heads, answers at a budget.

Everything is of the points measured: text, size range, one schedule, one learning rate a size. A
budget outside the points is an extrapolation and is called one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_k2.planning.scaling.grid import Measured
from megatron_k2.planning.scaling.law import FORMS, frontier
from megatron_k2.planning.scaling.uncertainty import Fitted, best_form, fit_with_bootstrap
from megatron_k2.training.sweeps.intervals import Interval, mean_interval


@dataclass(frozen=True)
class Findings:
    """A fit and what it was chosen from.

    Attributes:
        places: of the grid, those fitted.
        fitted: law, points and resampled laws.
        form_errors: form, with E or without -> error of left-out points in ln L.
        detects: whether a term of sparsity predicts left-out points better; if not, the law is
            still of the power form, for the interval that it gives.
        loss: at which FLOPs are compared: the law's at the smallest sparsity and the middle FLOPs.
    """

    places: tuple[Measured, ...]
    fitted: Fitted
    form_errors: Mapping[str, float]
    detects: bool
    loss: float

    @property
    def sparsities(self) -> list[float]:
        """Of the points, ascending."""
        return sorted({point.sparsity for point in self.fitted.points})

    def flops_ratio(self, sparsity: float, loss: float | None = None) -> Interval:
        """Return FLOPs of the smallest sparsity over those of another one at equal loss."""
        at, first = loss or self.loss, self.sparsities[0]
        return self.fitted.interval(lambda law: law.flops_ratio(at, sparsity, first))


def analyse(
    places: Sequence[Measured],
    form: str | None = None,
    floors: Sequence[float | None] = (0.0, None),
    loss: float | None = None,
) -> Findings:
    """Fit a law to places of a grid.

    Args:
        places: of one number of heads.
        form: of the law; None takes the one that predicts left-out points best.
        floors: the law's E to choose from by the same errors; None fits it.
        loss: at which FLOPs are compared; None takes the middle of the points.

    Raises:
        ValueError: the points cannot carry the fit.
    """
    budgets = {place.settings["tokens"] for place in places}
    points = [place.point for place in places]
    if len(budgets) > 1:  # several budgets a size: of those, the best use of the compute
        best = set(frontier(points))
        places = [place for place in places if place.point in best]
        points = [place.point for place in places]
    chosen, floor, errors = best_form(points, (form,) if form else tuple(FORMS), floors)
    detects = form is not None or chosen != "flat"
    if not detects and len({point.sparsity for point in points}) > 1:
        chosen = "power"
    fitted = fit_with_bootstrap(points, chosen, floor)
    law = fitted.law
    named = {f"{f}{' + E' if E is None else ''}": error for (f, E), error in errors.items()}
    at = loss or float(law.loss(law.flops0, law.sparsity0))
    return Findings(tuple(places), fitted, named, detects, at)


def lines(found: Findings) -> list[str]:
    """Return the findings in words and numbers."""
    law = found.fitted.law
    flops = [point.flops for point in found.fitted.points]
    errors = ", ".join(f"{form} {error:.2%}" for form, error in found.form_errors.items())
    told = [
        f"[fit] {len(flops)} points, {min(flops):.2e} to {max(flops):.2e} FLOPs; error of points "
        f"left out, in the loss: {errors}",
        f"[fit] form: {law.form}, {'E fitted' if law.fixed_floor is None else f'E {law.floor:g}'}",
        f"[fit] exponent of C at sparsity {law.sparsity0:g}: "
        f"{found.fitted.interval(lambda law: law.exponent)} (95 %)",
    ]
    if law.fixed_floor is None:
        told.append(f"[fit] floor E: {found.fitted.interval(lambda law: law.floor)} bits/byte")
    if not found.detects:
        told.append(
            "[fit] sparsity does not help to predict left-out points: no difference is claimed; "
            "what a power of it could be:"
        )
    if law.form == "power":
        power = found.fitted.interval(lambda law: law.theta[2] / law.theta[1])
        told.append(f"[fit] FLOPs at equal loss fall as sparsity to the power {power}")
    told.append(
        f"[fit] FLOPs of sparsity {found.sparsities[0]:g} over FLOPs of each, at "
        f"{found.loss:.4f} bits/byte:"
    )
    told += [f"  {s:4g}: {found.flops_ratio(s)}" for s in found.sparsities[1:]]
    return told


def places_table(places: Sequence[Measured]) -> list[str]:
    """Return a Markdown table of the points."""
    rows = ["| sparsity | size | active | all | tokens | FLOPs | bits/byte (95 % over seeds) |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for place in places:
        facts, bits = place.facts, place.interval
        spread = "" if math.isnan(bits.low) else f" ± {bits.high - bits.value:.4f}"
        rows.append(
            f"| {facts['sparsity']:g} | {facts['size']} | {facts['active_weights'] / 1e3:,.0f} k | "
            f"{facts['total_weights'] / 1e3:,.0f} k | {facts['tokens'] / 1e3:,.0f} k | "
            f"{facts['flops']:.2e} | {bits.value:.4f}{spread} |"
        )
    return rows


def heads_lines(places: Sequence[Measured]) -> list[str]:
    """Compare numbers of heads at equal sparsity, size and tokens, seed by seed (K2R 2.3)."""
    groups = sorted({place.settings["heads"] for place in places}, key=_number)
    first = {_apart_from_heads(p): p for p in places if p.settings["heads"] == groups[0]}
    told = []
    for heads in groups[1:]:
        relative: list[float] = []
        flops: list[float] = []
        for place in places:
            base = first.get(_apart_from_heads(place))
            if place.settings["heads"] != heads or base is None:
                continue
            flops.append(place.facts["flops"] / base.facts["flops"] - 1)
            changes = [loss / base.losses[seed] - 1 for seed, loss in place.losses.items()]
            relative.append(sum(changes) / len(changes))
        if relative:
            change = mean_interval(relative)
            told.append(
                f"[heads] {heads} against {groups[0]}: loss {100 * change.value:+.2f} % over "
                f"{len(relative)} places (95 %: {_percent(change)}), "
                f"FLOPs {100 * sum(flops) / len(flops):+.1f} %"
            )
    return told


def _percent(interval: Interval) -> str:
    return f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f} %"


def _number(heads: str) -> float:
    return float(heads.partition("/")[0])


def _apart_from_heads(place: Measured) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in place.settings.items() if k != "heads"))


def answer(found: Findings, budget: float, sparsities: Sequence[float]) -> list[str]:
    """Return what the law says at a budget: losses, the best sparsity, what it saves.

    Args:
        found: a fit.
        budget: training FLOPs.
        sparsities: to choose from; those of the points when empty.

    Raises:
        ValueError: a budget that is not above 0, or a sparsity outside the points'.
    """
    if not budget > 0 or math.isinf(budget):
        raise ValueError(f"--budget {budget:g} must be a finite number above 0")
    known = found.sparsities
    wanted = sorted(set(sparsities)) or known
    for sparsity in wanted:
        if not known[0] <= sparsity <= known[-1]:
            raise ValueError(
                f"--sparsity {sparsity:g} must be from {known[0]:g} to {known[-1]:g}, the measured"
            )
    flops = [point.flops for point in found.fitted.points]
    told = []
    if not min(flops) <= budget <= max(flops):
        nearest = min(flops) if budget < min(flops) else max(flops)
        told.append(
            f"[ask] EXTRAPOLATION: the points end at {nearest:.2e} FLOPs, {budget:.2e} is "
            f"{max(budget / nearest, nearest / budget):.3g} times away; the intervals do not hold "
            "what may change there"
        )
    if not found.detects:
        told.append("[ask] sparsity does not help to predict left-out points; see the intervals")
    losses = found.fitted.law.loss(budget, np.array(wanted))
    sample = found.fitted.sample(lambda law: law.loss(budget, np.array(wanted)))
    for index, (sparsity, low, high) in enumerate(
        zip(wanted, *found.fitted.ends(losses, sample), strict=True)
    ):
        ahead = np.mean(sample.argmin(axis=1) == index) if len(sample) else math.nan
        loss = Interval(float(losses[index]), float(low), float(high))
        told.append(f"  sparsity {sparsity:4g}: {loss} bits/byte; best in {ahead:.0%} of resamples")
    if np.ptp(losses) < 1e-4:
        return [*told, "[ask] these sparsities cannot be told apart at this budget"]
    best = int(losses.argmin())
    behind = found.fitted.ends(losses - losses[best], sample - sample[:, best : best + 1])
    level = min(s for s, low in zip(wanted, behind[0], strict=True) if not low > 0)
    told.append(
        f"[ask] lowest predicted loss at {budget:.2e} FLOPs: sparsity {wanted[best]:g}"
        if level == wanted[best]
        else f"[ask] lowest predicted loss at {budget:.2e} FLOPs: sparsity {wanted[best]:g}; "
        f"{level:g} cannot be told from it at 95 % and stores fewer weights"
    )
    if best:
        saved = found.fitted.interval(
            lambda law: law.flops_ratio(float(losses[best]), wanted[best], wanted[0])
        )
        told.append(
            f"[ask] sparsity {wanted[0]:g} would need {saved} times the FLOPs for the same loss"
        )
    return told


def as_json(found: Findings) -> dict[str, Any]:
    """Return the findings as JSON values."""
    law = found.fitted.law
    return {
        "form": law.form,
        "theta": law.theta.tolist(),
        "flops0": law.flops0,
        "sparsity0": law.sparsity0,
        "floor": law.floor,
        "exponent": asdict(found.fitted.interval(lambda law: law.exponent)),
        "detects": found.detects,
        "left_out_errors": dict(found.form_errors),
        "equal_loss": found.loss,
        "flops_ratio": {f"{s:g}": asdict(found.flops_ratio(s)) for s in found.sparsities},
        "points": [
            {**asdict(place.point), "losses": dict(place.losses), "facts": dict(place.facts)}
            for place in found.places
        ],
    }
