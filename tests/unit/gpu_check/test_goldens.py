"""Rung 1 on the CPU, in this process: the golden run, a run like it, and planted errors."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_k2.gpu_check import goldens, record
from megatron_k2.gpu_check.bounds import LIMITS, MEASURED, Differences
from megatron_k2.gpu_check.check import Figure, Place
from megatron_k2.gpu_check.goldens import VARIANTS, compare, run_variant
from megatron_k2.gpu_check.ladder import Ladder
from megatron_k2.gpu_check.record import Recording, load_recording
from megatron_k2.gpu_check.training_log import expected_first_loss
from megatron_k2.model import router
from megatron_k2.training.launch import free_port

SHORT = (*goldens.MICRO, "--seq-length", "32")
EXACT = VARIANTS[0]


class InThisProcess:
    """Runs a worker's ``main`` here: the imports are paid already."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def until(self, seconds: float) -> None:
        pass

    def __call__(
        self, module: str, arguments: Sequence[str], log: Path, *unused: Any, **also: Any
    ) -> str:
        self.runs.append(log.stem)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
            for name in ("RANK", "LOCAL_RANK"):
                patch.setenv(name, "0")
            patch.setenv("WORLD_SIZE", "1")
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", str(free_port()))
            importlib.import_module(module).main(list(arguments))
        return ""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "STEPS", 2)
        yield Place("cpu", tmp_path_factory.mktemp("gpu-check"), InThisProcess())


@pytest.fixture(scope="module")
def golden(place: Place) -> Recording:
    return load_recording(goldens.golden(place, SHORT, "micro", "cpu"))


def figures(place: Place) -> dict[str, Figure]:
    found = run_variant(place, EXACT, SHORT, "micro", "cpu")
    return {figure.name: figure for figure in found}


def test_a_run_from_the_golden_start_is_the_golden_run_to_the_bit(
    place: Place, golden: Recording
) -> None:
    found = figures(place)
    assert {figure.value for figure in found.values()} == {0.0}
    assert len(found) == len(fields(Differences)) and all(one.bound for one in found.values())
    assert place.run.runs == ["golden", "golden-fp32"]  # type: ignore[attr-defined]


def test_the_golden_run_does_what_is_compared(golden: Recording) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    assert golden.losses[0] == pytest.approx(math.log(512) + 128 * 0.1**2 / 2, abs=0.4)
    assert len(golden.attention) == 4 and len(golden.routes) == 3
    assert all(bool((routes.sum(1) == 2).all()) for routes in golden.routes.values())
    factors, logits = torch.stack(golden.clip_factors), torch.stack(golden.max_logits)
    hot = logits > 1.0
    assert 0 < hot.sum() < hot.numel() and torch.equal(factors < 1, hot)
    assert all(not torch.equal(golden.before[name], after) for name, after in golden.after.items())
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is None  # nothing is left to this process


def test_wrong_experts_are_found(
    place: Place, golden: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted kernel: top-k takes the first choice and the third."""

    def wrong(scores: torch.Tensor, topk: int) -> torch.Tensor:
        experts = torch.topk(scores, k=topk + 1, dim=-1).indices[:, [0, topk]]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, True)

    monkeypatch.setattr(router, "topk_mask", wrong)
    outside = {name for name, figure in figures(place).items() if not figure.is_within}
    assert {"first routes", "routes", "loss", "updates"} <= outside
    assert "first attention" not in outside  # it comes before any expert


def test_a_wrong_golden_fails_the_check_by_the_figures_name(
    place: Place, golden: Recording, tmp_path: Path
) -> None:
    file = place.output / "micro" / "golden.pt"
    planted = replace(golden, attention={k: 1.1 * x for k, x in golden.attention.items()})
    planted.save(file)
    check = next(one for one in goldens.CHECKS if one.name == EXACT.name)
    check = replace(check, run=lambda _: run_variant(place, EXACT, SHORT, "micro", "cpu"))
    try:
        apart = replace(place, output=tmp_path)
        ((_, outcome, _),) = Ladder([check], apart, {"device": "cpu"}).climb()
    finally:
        golden.save(file)
    assert outcome.status == "failed"
    assert outcome.reason == "outside its bound: first attention, attention"
    stored = json.loads((tmp_path / "outcomes" / f"{EXACT.name}.json").read_text())
    assert stored["status"] == "failed"


def test_a_golden_run_is_made_anew_for_other_flags_and_another_machine(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(module: str, arguments: Sequence[str], log: Path, **also: Any) -> str:
        assert also == {"hides_gpus": True}
        log.parent.mkdir(parents=True)  # what was there is gone
        Path(arguments[0]).touch()
        ran.append(log.stem)
        return ""

    apart = Place("cuda", tmp_path, run)  # type: ignore[arg-type]
    for expected in (1, 1):
        goldens.golden(apart, SHORT, "micro", "cpu")
        assert len(ran) == expected
    (tmp_path / "machine.json").write_text('{"commit": "another"}')
    goldens.golden(apart, SHORT, "micro", "cpu")
    goldens.golden(apart, goldens.MICRO, "micro", "cpu")
    assert len(ran) == 3


def test_a_loss_that_is_no_number_is_outside(golden: Recording) -> None:
    broken = replace(golden, losses=[golden.losses[0], float("nan")])
    figures = goldens.figures_of(compare(golden, broken), "bf16")
    assert [one.name for one in figures if not one.is_within] == ["loss"]


def test_bounds_lie_above_what_the_same_format_differs_by_and_within_five_times() -> None:
    for name, measured in MEASURED.items():
        for field, value in asdict(measured).items():
            assert 1.7 * value < getattr(LIMITS[name], field) <= 5 * value, (name, field)


def test_the_first_loss_of_a_preset_follows_from_its_sizes() -> None:
    assert expected_first_loss("k2-micro") == pytest.approx(6.264, abs=1e-3)
    assert expected_first_loss("kimi-k2") == pytest.approx(13.440, abs=1e-3)
