"""Fits of the loss over FLOPs and sparsity: published laws, known laws, honest intervals."""

import math

import numpy as np
import pytest

from megatron_k2.planning.scaling.law import FORMS, Point, fit, frontier
from megatron_k2.planning.scaling.uncertainty import best_form, fit_with_bootstrap
from megatron_k2.training.sweeps.intervals import mean_interval, paired_difference, t_quantile

# Moonlight (arXiv 2502.16982), figure 3: the five stars of each optimizer, read off the centres of
# its markers in figures/chinlaw_8k_flops_ratio.png of MoonshotAI/Moonlight (c2ad5b2). A pixel is
# 0.3 % of C and 0.0005 to 0.0008 of the loss. Abscissae in PFLOP/s-days.
MOONLIGHT_FLOPS = (0.2088, 0.5290, 1.1805, 2.1718, 4.0440)
ADAMW = (2.8508, 2.6811, 2.5887, 2.5018, 2.4209)
MUON = (2.7256, 2.5741, 2.4877, 2.4078, 2.3357)
# Table 2 there: weights without embeddings and tokens. 6 N D, the same abscissae but for the first.
MOONLIGHT_WEIGHTS = (399e6, 545e6, 822e6, 1.1e9, 1.5e9)
MOONLIGHT_TOKENS = (8.92e9, 14.04e9, 20.76e9, 28.54e9, 38.91e9)
PFLOP_S_DAY = 1e15 * 86400


def moonlight(losses: tuple[float, ...]) -> list[Point]:
    return [Point(c, 1, loss) for c, loss in zip(MOONLIGHT_FLOPS, losses, strict=True)]


@pytest.mark.parametrize(
    ("losses", "coefficient", "exponent"), [(ADAMW, 2.608, 0.054), (MUON, 2.506, 0.052)]
)
def test_moonlights_law_is_reproduced_from_its_points(losses, coefficient, exponent):
    law = fit(moonlight(losses), "flat")
    # Printed with three decimals (half a unit), and the points' reading errors, see above.
    assert law.coefficient == pytest.approx(coefficient, abs=1e-3)
    assert law.exponent == pytest.approx(exponent, abs=1e-3)


def test_moonlights_saving_is_reproduced_at_its_last_point():
    adamw = fit(moonlight(ADAMW), "flat")
    share = MOONLIGHT_FLOPS[-1] / adamw.flops_for(MUON[-1], 1)
    # The figure says 0.519. A pixel of loss moves it by 0.6 %, the printed laws give 0.525.
    assert share == pytest.approx(0.519, rel=0.02)


def test_moonlights_table_gives_the_abscissae_of_its_figure_but_for_the_first():
    counted = [
        6 * n * d / PFLOP_S_DAY for n, d in zip(MOONLIGHT_WEIGHTS, MOONLIGHT_TOKENS, strict=True)
    ]
    # Weights are printed with two to four digits: 1.1 B is within 4.5 % of anything it stands for.
    assert counted[1:] == pytest.approx(MOONLIGHT_FLOPS[1:], rel=0.01)
    assert counted[0] == pytest.approx(0.2472, abs=1e-4)  # the figure's first star is at 0.209


def test_k2s_published_savings_are_a_power_of_sparsity():
    """K2R 2.3: at equal loss sparsity 48 needs 1.69, 1.39, 1.15 times fewer FLOPs than the others.

    Laid on curves of any exponent, the power form gives all three back with one number.
    """
    saved = {8: 1 / 1.69, 16: 1 / 1.39, 32: 1 / 1.15, 48: 1.0}
    points = [
        Point(flops, s, 1.5 * (flops * share / 5e20) ** -0.06)
        for s, share in saved.items()
        for flops in (1e20, 3e20, 1e21)
    ]
    law = fit(points, "power")
    for sparsity, share in saved.items():
        # The report's three numbers are not an exact power: 1.15 is 2.2 % off.
        assert law.flops_ratio(1.5, 48, sparsity) == pytest.approx(1 / share, rel=0.025)
    assert law.theta[2] / law.theta[1] == pytest.approx(0.289, abs=1e-3)


TRUTH = {
    "flat": (0.9, -0.12),
    "power": (0.9, -0.12, -0.05),
    "curved": (0.9, -0.12, -0.08, 0.02),
    "tilted": (0.9, -0.12, -0.05, -0.01),
}
FLOPS, SPARSITIES = (1e11, 1e12, 2e12, 4e12), (8.0, 16.0, 32.0, 64.0)


def draw(form: str, floor: float = 0.0, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Points of a known law: c and x as the fit defines them, so that theta is comparable."""
    generator = np.random.default_rng(seed)
    middle = math.exp(np.mean(np.log(FLOPS)))
    points = []
    for flops in FLOPS:
        for sparsity in SPARSITIES:
            c, x = math.log(flops / middle), math.log(sparsity / SPARSITIES[0])
            values = {"g": x, "h": x * x, "k": c * x}
            terms = (1, c, *(values[name] for name in FORMS[form]))
            exponent = sum(t * v for t, v in zip(TRUTH[form], terms, strict=True))
            loss = (floor + math.exp(exponent)) * math.exp(noise * generator.standard_normal())
            points.append(Point(flops, sparsity, loss))
    return points


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("floor", [0.0, 1.1])
def test_a_known_law_is_recovered_with_its_floor_given_or_fitted(form, floor):
    law = fit(draw(form, floor), form, floor)
    assert law.theta == pytest.approx(TRUTH[form], abs=1e-8)
    if floor:
        found = fit(draw(form, floor), form, None)
        assert found.floor == pytest.approx(floor, rel=1e-5)
        assert found.theta[:-1] == pytest.approx(TRUTH[form], rel=1e-4)


@pytest.mark.parametrize("form", ["power", "curved", "tilted"])
def test_flops_for_a_loss_are_the_inverse_of_the_loss(form):
    law = fit(draw(form, 0.7), form, 0.7)
    for sparsity in SPARSITIES:
        assert law.flops_for(float(law.loss(3e12, sparsity)), sparsity) == pytest.approx(3e12)
    with pytest.raises(ValueError, match=r"--loss 0.6 must be above the fitted floor 0.7"):
        law.flops_for(0.6, 8)


def test_the_form_that_made_the_points_predicts_left_out_ones_best():
    assert best_form(draw("curved", noise=0.001))[0] == "curved"
    assert best_form(draw("tilted", noise=0.001))[0] == "tilted"
    assert [best_form(draw("power", noise=0.01, seed=seed))[0] for seed in range(9)] == [
        "power"
    ] * 9
    assert [best_form(draw("flat", noise=0.01, seed=seed))[0] for seed in range(9)] == ["flat"] * 9


@pytest.mark.parametrize("form", ["power", "curved"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(form):
    """Of 800 grids of 16 points: 95 %, with a standard error of 0.8 %; four of them allowed."""
    held = np.zeros(len(TRUTH[form]))
    for seed in range(800):
        fitted = fit_with_bootstrap(draw(form, noise=0.01, seed=seed), form, replicates=500)
        low, high = fitted.ends(fitted.law.theta, fitted.thetas)
        held += (low <= TRUTH[form]) & (np.array(TRUTH[form]) <= high)
    assert (abs(held / 800 - 0.95) < 0.032).all(), held / 800


def test_an_exact_law_has_no_width_and_too_few_points_have_no_interval():
    exact = fit_with_bootstrap(draw("power"), "power", replicates=50)
    interval = exact.interval(lambda law: law.exponent)
    assert interval.low == pytest.approx(0.12) and interval.high == pytest.approx(0.12)
    few = fit_with_bootstrap(moonlight(MUON)[:2], "flat")
    assert not len(few.thetas) and math.isnan(few.interval(lambda law: law.exponent).low)


@pytest.mark.parametrize(
    ("points", "form", "floor", "message"),
    [
        (moonlight(MUON), "power", 0.0, "--form power needs 2 sparsities, found 1"),
        (draw("flat"), "round", 0.0, "--form round must be one of flat, power, curved, tilted"),
        (moonlight(MUON), "flat", 2.4, "--floor 2.4 must be below every loss"),
        (moonlight(MUON)[:1], "flat", 0.0, "has 2 parameters and too few points"),
        ([*moonlight(MUON), Point(1.0, 1, math.nan)], "flat", 0.0, "must be finite and above 0"),
    ],
)
def test_points_that_cannot_carry_a_fit_are_refused(points, form, floor, message):
    with pytest.raises(ValueError, match=message):
        fit(points, form, floor)


def test_a_floor_is_fitted_only_where_it_predicts_better():
    chosen = [
        best_form(draw("power", floor, noise=0.001), ("power",), (0.0, None))[1]
        for floor in (1.5, 0.0)
    ]
    assert chosen == [None, 0.0]


def test_the_frontier_drops_what_another_run_beats_with_no_more_flops():
    kept, beaten, other = Point(1, 8, 3.0), Point(2, 8, 3.1), Point(2, 16, 3.2)
    assert frontier([kept, beaten, other, Point(4, 8, 2.5)]) == [kept, other, Point(4, 8, 2.5)]


@pytest.mark.parametrize(
    ("probability", "dof", "quantile"),
    # Abramowitz and Stegun, table 26.10.
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 5, 2.571), (0.95, 30, 1.697), (0.9, 3, 1.638)],
)
def test_t_quantiles_are_the_tables(probability, dof, quantile):
    assert t_quantile(probability, dof) == pytest.approx(quantile, abs=5e-4)


def test_a_paired_interval_takes_out_what_seeds_share():
    first = {1: 2.0, 2: 3.0, 3: 4.0}
    second = {1: 1.9, 2: 2.88, 3: 3.9, 4: 9.0}
    paired = paired_difference(first, second)
    assert paired.value == pytest.approx(-0.32 / 3) and paired.excludes_zero
    assert paired.high - paired.value == pytest.approx(4.3027 * 0.011547 / math.sqrt(3), rel=1e-3)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({1: 1.0}, {2: 1.0})


def test_one_seed_has_no_interval_and_says_so():
    assert "one seed: no interval" in str(mean_interval([2.0]))
    assert not mean_interval([2.0]).excludes_zero
