"""The grid of a scaling law and what is said of it, on results whose law is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_k2.planning.scaling.command import main
from megatron_k2.planning.scaling.grid import Grid, measured
from megatron_k2.planning.scaling.report import analyse, answer, heads_lines, lines

GRID = Grid(
    preset="k2-micro", sizes=("48x3", "64x4", "96x4@5e-3"), sparsities=(8, 16, 32, 64), topk=2,
    tokens_per_weight=(4.0,), heads_per_layer=(), vocab_size=1024, seq_length=256, batch=8,
    flags=("--lr", "1e-2"),
)  # fmt: skip


def results(grid: Grid = GRID, seeds=(1, 2, 3), noise=0.002, power=0.3) -> list[dict]:
    """What runs would leave whose FLOPs at equal loss go as sparsity to a power."""
    found = []
    for cell in grid.cells(seeds):
        generator = np.random.default_rng([1, cell.seed, *map(ord, cell.label)])
        flops = cell.facts["flops"] * cell.facts["sparsity"] ** power
        loss = 3.0 * (flops / 1e12) ** -0.1 * math.exp(noise * generator.standard_normal())
        loss *= 1 - 0.01 * (cell.facts["heads"] > 3)
        found.append(
            {
                "settings": dict(cell.settings), "seed": cell.seed, "facts": dict(cell.facts),
                "bits_per_byte": {"all": loss, "code": 2 * loss},
            }
        )  # fmt: skip
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of finished runs."""
    for number, result in enumerate(results()):
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        (tmp_path / "runs" / str(number) / "result.json").write_text(json.dumps(result))
    return tmp_path


def test_a_grid_trains_equal_tokens_at_equal_size_and_takes_a_sizes_own_rate():
    cells = GRID.cells([1, 2])
    assert len(cells) == 24 and [cell.seed for cell in cells] == [1] * 12 + [2] * 12
    for start in (0, 4, 8):
        same = cells[start : start + 4]
        assert [cell.facts["sparsity"] for cell in same] == [8, 16, 32, 64]
        assert len({cell.facts["tokens"] for cell in same}) == 1
        assert len({cell.facts["body_weights"] for cell in same}) == 1
        tokens, weights = same[0].facts["tokens"], same[0].facts["body_weights"]
        assert abs(tokens / weights - 4) <= 8 * 256 / weights  # whole steps
    rates = [cell.flags[len(cell.flags) - cell.flags[::-1].index("--lr")] for cell in cells]
    assert rates[:12] == ["1e-2"] * 8 + ["5e-3"] * 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sizes", ("64",), "--sizes 64: wanted HIDDENxLAYERS"),
        ("sparsities", (0,), "--sparsities 0 must be at least 1"),
        ("tokens_per_weight", (0.0,), "--tokens-per-weight 0 must be above 0"),
    ],
)
def test_grids_that_cannot_be_trained_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{**vars(GRID), field: value}).cells([1])


def test_only_seeds_that_every_place_has_are_compared():
    places, left_out = measured(results()[:-1])
    assert left_out == {3} and len(places) == 12
    assert all(set(place.losses) == {1, 2} for place in places)
    with pytest.raises(ValueError, match="no seed has finished in every place"):
        measured(
            [r for r in results(seeds=(1, 2)) if (r["facts"]["sparsity"] > 8) != (r["seed"] > 1)]
        )
    with pytest.raises(ValueError, match="--domain prose is unknown; the runs have all, code"):
        measured(results(), "prose")


def test_flops_saved_at_equal_loss_hold_the_true_ones():
    found = analyse(measured(results())[0], "power", (0.0,))
    for sparsity in (16, 32, 64):
        saved = found.flops_ratio(sparsity)
        assert saved.low <= (sparsity / 8) ** 0.3 <= saved.high
    flat = analyse(measured(results(power=0.0))[0], "power", (0.0,))
    assert flat.flops_ratio(64).low <= 1 <= flat.flops_ratio(64).high


def test_the_answer_names_the_best_sparsity_and_calls_an_extrapolation_one():
    found = analyse(measured(results())[0], "power", (0.0,))
    inside = "\n".join(answer(found, 1e12, []))
    assert "EXTRAPOLATION" not in inside
    assert "lowest predicted loss at 1.00e+12 FLOPs: sparsity 64" in inside
    assert "EXTRAPOLATION" in answer(found, 1e15, [])[0]
    with pytest.raises(ValueError, match="--sparsity 128 must be from 8 to 64, the measured"):
        answer(found, 1e12, [128])
    with pytest.raises(ValueError, match="--budget -1 must be a finite number above 0"):
        answer(found, -1, [])


def test_noise_alone_is_said_to_show_no_difference():
    found = analyse(measured(results(noise=0.01, power=0.0))[0], floors=(0.0,))
    assert not found.detects and found.fitted.law.form == "power"
    assert found.flops_ratio(64).low <= 1 <= found.flops_ratio(64).high
    assert any("no difference is claimed" in line for line in lines(found))
    assert "does not help to predict" in answer(found, 1e12, [])[0]


def test_heads_are_compared_at_equal_size_and_tokens():
    grid = Grid(**{**vars(GRID), "heads_per_layer": (1.0, 2.0), "sizes": ("48x3", "96x3")})
    told = heads_lines(measured(results(grid, noise=1e-6, power=0.0))[0])
    # More than three heads lower the loss by 1 %; their FLOPs by the law as well.
    assert len(told) == 1 and "2/layer against 1/layer: loss -" in told[0]
    assert "FLOPs +" in told[0]


def test_fit_prints_and_draws_and_ask_answers(folder, capsys):
    figure = folder / "scaling.svg"
    arguments = ["--output", str(folder), "--floor", "0", "--figure", str(figure)]
    assert main(["fit", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 64 |") == 3 and "form: power, E 0" in printed
    assert figure.read_text().startswith("<?xml")
    record = json.loads((folder / "fit.json").read_text())
    assert len(record["points"]) == 12 and record["flops_ratio"]["8"]["value"] == 1.0
    arguments = ["--output", str(folder), "--floor", "0", "--domain", "code"]
    assert main(["ask", *arguments, "--budget", "1e12"]) == 0
    assert "best in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "holds no finished run"),
        (["run", "--sizes", "64x4", "--batch", "8"], "no learning rate: give --lr"),
        (
            ["run", "--sizes", "64x4", "--batch", "8", "--lr", "1", "--num-experts", "8"],
            "--num-experts is set by the grid",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, capsys, arguments, message):
    assert main([arguments[0], "--output", str(tmp_path / "out"), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
