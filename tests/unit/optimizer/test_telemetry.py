"""What is logged: true sizes of updates, orthogonality, shares of heads; when it is measured."""

from __future__ import annotations

import pytest
import torch

from megatron_k2.optimizer.matrices import GATE_AND_UP, Rule
from megatron_k2.optimizer.muonclip import MuonClip
from megatron_k2.optimizer.qk_clip import QKClip
from megatron_k2.optimizer.telemetry import Telemetry, report

CPU = torch.device("cpu")
RULES = (
    Rule("*.self_attention.*", "muon"),
    Rule("*.experts.*", "muon", GATE_AND_UP),
    Rule("*.router.*", "muon"),
)
SHAPES = {
    "l.self_attention.linear_proj.weight": (12, 20),
    "l.mlp.experts.linear_fc1.weight": (3, 16, 10),
    "l.mlp.router.weight": (6, 9),
}


def figures(*telemetries: Telemetry, clip: QKClip | None = None) -> dict[str, float]:
    return report(telemetries, clip, (1, 3), 3, CPU)


@pytest.mark.usefixtures("single_process")
def test_the_update_size_is_what_the_weights_moved_by() -> None:
    weights = {name: torch.zeros(shape).requires_grad_() for name, shape in SHAPES.items()}
    optimizer = MuonClip.for_model(weights.items(), RULES, lr=1.0)
    telemetry = Telemetry(1, CPU)
    assert optimizer.exchange is not None
    optimizer.attach(optimizer.exchange, list(weights.values()), telemetry=telemetry)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    experts = weights["l.mlp.experts.linear_fc1.weight"]
    assert experts.grad is not None
    experts.grad[1] = 0.0  # a cold expert: two matrices that do not move
    optimizer.step()
    found = figures(telemetry)
    for (name, weight), kind in zip(
        weights.items(), ("attention", "experts", "router"), strict=True
    ):
        moved = weight.detach().double()
        true = moved.square().mean().sqrt()
        assert found[f"k2/update-rms/{kind}"] == pytest.approx(float(true), rel=1e-2), name
        matrices = moved.view(-1, 8, 10) if kind == "experts" else moved[None]
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        grams = [m @ m.T / scale**2 for m in matrices if m.any()]
        squares = [(g - torch.eye(len(g))).square().sum() for g in grams]
        residual = (sum(squares) / sum(len(g) for g in grams)) ** 0.5
        assert found[f"k2/orthogonality-residual/{kind}"] == pytest.approx(
            float(residual), rel=0.05
        )
    assert "k2/update-rms/mlp" not in found


@pytest.mark.usefixtures("single_process")
def test_shares_of_heads_are_of_all_steps_since_the_last_report() -> None:
    rows = torch.tensor([[50.0, 200.0], [torch.nan, -torch.inf]])
    clip = QKClip(100.0, [], lambda: rows)
    for _ in range(2):
        clip.start()
        clip.apply_()
    rows = torch.full((2, 2), 7.0)
    for _ in range(2):
        clip.start()
        clip.apply_()
    found = figures(clip=clip)
    assert (found["k2/heads-clipped"], found["k2/heads-broken"]) == (2 / 16, 2 / 16)
    assert (found["k2/max-logit/layer-01"], found["k2/max-logit/layer-03"]) == (7.0, 7.0)
    assert "k2/max-logit/layer-02" not in found
    assert "k2/heads-clipped" not in figures(clip=clip), "nothing since"


@pytest.mark.usefixtures("single_process")
def test_measured_steps_follow_the_log_also_after_steps_that_were_skipped() -> None:
    telemetry, measured, step = Telemetry(4, CPU), [], 0
    for iteration in range(1, 17):
        if iteration not in (6, 7):  # skipped: no step of the optimizer
            step += 1
            telemetry.begin(step)
            measured += [iteration] if telemetry.active else []
        if iteration % 4 == 0:
            figures(telemetry)
    assert measured == [4, 12, 16]
    resumed = Telemetry(4, CPU)
    resumed.begin(7)
    assert not resumed.active
    resumed.begin(8)
    assert resumed.active
    silent = Telemetry(0, CPU)
    silent.begin(4)
    assert not silent.active
