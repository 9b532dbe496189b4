"""MuonClip of one process against a slow fp64 twin, torch.optim.Muon and torch.optim.AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_k2.optimizer import directions as directions_module
from megatron_k2.optimizer.coefficients import coefficient_schedule
from megatron_k2.optimizer.directions import (
    BATCH_BYTES,
    Orthogonaliser,
    batches,
    directions_of,
)
from megatron_k2.optimizer.matrices import GATE_AND_UP, Cut, Rule, kimi_rules
from megatron_k2.optimizer.muonclip import MuonClip
from tests.reference.newton_schulz import by_singular_values

FP32 = Orthogonaliser(compute_dtype=torch.float32)
RULES = (
    Rule("plain*", "muon"),
    Rule("gated*", "muon", GATE_AND_UP),
    Rule("heads*", "muon", Cut((2, 1), by="head")),
    Rule("table", "adamw"),
)
SHAPES = {
    "plain.wide": (6, 15),
    "plain.tall": (15, 6),
    "plain.experts": (3, 4, 9),
    "gated": (10, 7),
    "gated.experts": (2, 8, 5),
    "heads": (12, 5),
    "table": (9, 4),
    "gain": (5,),
}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def twin_direction(matrix: torch.Tensor) -> torch.Tensor:
    scale = 0.2 * max(matrix.shape) ** 0.5
    return scale * by_singular_values(matrix, coefficient_schedule("kimi"))


def twin_directions(name: str, stored: torch.Tensor) -> torch.Tensor:
    """Matrix by matrix, rows named one by one."""
    if stored.ndim == 3:
        return torch.stack([twin_directions(name, one) for one in stored])
    rows = torch.arange(stored.shape[0])
    if name.startswith("gated"):
        parts = list(rows.chunk(2))
    elif name.startswith("heads"):
        parts = [part for head in rows.chunk(4) for part in (head[:2], head[2:])]
    else:
        parts = [rows]
    result = torch.empty_like(stored, dtype=torch.float64)
    for part in parts:
        result[part] = twin_direction(stored[part])
    return result


def test_three_steps_equal_the_fp64_twin():
    found = parameters()
    optimizer = MuonClip.for_model(found.items(), RULES, lr=0.02, rule=FP32)
    twin = {name: value.detach().double() for name, value in found.items()}
    momenta = {name: torch.zeros_like(value) for name, value in twin.items()}
    squares = {name: torch.zeros_like(value) for name, value in twin.items()}
    for step in range(3):
        for name, grad in gradients(step).items():
            found[name].grad = grad
            wide = grad.double()
            if name in ("table", "gain"):
                momenta[name] = 0.9 * momenta[name] + 0.1 * wide
                squares[name] = 0.95 * squares[name] + 0.05 * wide**2
                root = (squares[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                update = momenta[name] / (1 - 0.9 ** (step + 1)) / root
            else:
                momenta[name] = 0.95 * momenta[name] + wide
                update = twin_directions(name, wide + 0.95 * momenta[name])
            twin[name] = twin[name] * (1 - 0.02 * 0.1) - 0.02 * update
        optimizer.step()
    for name, value in twin.items():
        torch.testing.assert_close(found[name].double(), value, atol=2e-5, rtol=0)


def test_plain_matrices_move_as_under_torchs_muon():
    ours, theirs = torch.randn(2, 1, 24, 40).bfloat16().float()[0].repeat(2, 1, 1)
    ours, theirs = ours.requires_grad_(), theirs.clone().requires_grad_()
    mine = MuonClip.for_model([("plain", ours)], RULES, lr=0.02)
    peer = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad, grad.clone()
        mine.step()
        peer.step()
    moved = (ours - theirs).detach().norm() / (0.02 * 3 * 0.2 * 40**0.5 * 24**0.5)
    assert moved < 0.05, "bf16 products differ by rounding alone"


def test_the_rest_moves_as_under_torchs_adamw():
    ours, theirs = parameters()["table"], parameters()["table"]
    mine = MuonClip.for_model([("table", ours)], RULES, lr=0.02)
    peer = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        ours.grad, theirs.grad = gradients(step)["table"], gradients(step)["table"]
        mine.step()
        peer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("max_batch_bytes", [1, 1000, 1 << 30])
def test_the_memory_cap_changes_no_bit_and_each_matrix_is_done_once(
    monkeypatch: pytest.MonkeyPatch, max_batch_bytes: int
):
    counted: list[int] = []
    original = directions_module.newton_schulz

    def counting(matrices, *arguments):
        counted.append(matrices.shape[0])
        return original(matrices, *arguments)

    monkeypatch.setattr(directions_module, "newton_schulz", counting)
    momenta = [torch.randn(n, r, c) for n, r, c in ((2, 6, 9), (3, 9, 6), (1, 6, 9), (4, 5, 5))]
    groups = batches([(n, r, c) for n, r, c in (m.shape for m in momenta)], max_batch_bytes)
    found = {}
    for group in groups:
        chosen = [momenta[index] for index in group]
        found.update(zip(group, directions_of(chosen, FP32), strict=True))
    assert sum(counted) == 10
    for index, momentum in enumerate(momenta):
        assert found[index].shape == momentum.shape
        assert torch.equal(found[index], directions_of([momentum], FP32)[0])


def test_a_zero_gradient_moves_nothing_but_the_decay():
    found = parameters()
    optimizer = MuonClip.for_model(found.items(), RULES, lr=0.02, rule=FP32)
    before = {name: value.detach().clone() for name, value in found.items()}
    for value in found.values():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.002), atol=0, rtol=1e-6)


def test_state_survives_a_round_trip():
    first, second = parameters(), parameters()
    one, other = (MuonClip.for_model(p.items(), RULES, lr=0.02) for p in (first, second))
    for step in range(2):
        for name, grad in gradients(step).items():
            first[name].grad = grad
        one.step()
    with torch.no_grad():
        for name, value in second.items():
            value.copy_(first[name])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, values in ((one, first), (other, second)):
        for name, grad in gradients(9).items():
            values[name].grad = grad
        optimizer.step()
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_numbers_out_of_range_and_unnamed_matrices_are_refused():
    for name, value in {
        "momentum": 1.0, "lr": -1.0, "weight_decay": -0.1, "betas": (0.9, 1.5), "eps": 0.0
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"muonclip: {name} .* must be "):
            MuonClip.for_model([], RULES, **{name: value})
    with pytest.raises(ValueError, match=r"no rule says what other \[2, 2\] is"):
        MuonClip.for_model([("other", torch.zeros(2, 2))], RULES)
    with pytest.raises(ValueError, match=r"momenta are \[n, rows, columns\]"):
        directions_of([torch.zeros(2, 2)], FP32)


class Operations(TorchDispatchMode):
    """Counts aten operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("width", "hidden", "batch_bytes", "most"),
    [
        (32, 48, BATCH_BYTES["cuda"], 60),  # one batch of all 72 matrices: the bar
        (256, 512, BATCH_BYTES["cpu"], 400),  # pieces of 8 matrices, the CPU's cache
        # kimi-k2's own: 18 batches of 4 under a workspace of 4 GiB, symmetric products in blocks;
        # two thirds of the operations make views.
        (2048, 7168, BATCH_BYTES["cuda"], 9_500),
        (2048, 7168, 5 << 30, 540),  # one batch of them, if a workspace of 80 GiB allowed it
    ],
)
def test_operations_of_a_moe_layers_24_local_experts(width, hidden, batch_bytes, most):
    """Upstream's loop over matrices takes 1,634 for the same layer, whatever its width."""
    layer = "decoder.layers.1.mlp.experts."
    shapes = {"linear_fc1": (24, 2 * width, hidden), "linear_fc2": (24, hidden, width)}
    weights = {
        f"{layer}{name}.weight": torch.empty(shape, device="meta").requires_grad_()
        for name, shape in shapes.items()
    }
    optimizer = MuonClip.for_model(
        weights.items(), kimi_rules(32, 16, 32), max_batch_bytes=batch_bytes
    )
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    with Operations() as operations:
        optimizer.step()
    assert 0.9 * most < operations.count < most


def test_state_is_adamws_less_one_moment_of_the_matrices():
    found = parameters()
    optimizer = MuonClip.for_model(found.items(), RULES, lr=0.02)
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    vectors = {"table", "gain"}
    wanted = sum((8 if name in vectors else 4) * value.numel() for name, value in found.items())
    assert held == wanted
