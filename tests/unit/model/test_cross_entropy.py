"""The tiled cross entropy of one process against torch's and upstream's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_k2.model import cross_entropy
from megatron_k2.model.cross_entropy import tiled_vocab_parallel_cross_entropy
from megatron_k2.patches.cpu import tiled_cross_entropy

pytestmark = pytest.mark.usefixtures("single_process")


def loss_and_gradient(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = tiled_vocab_parallel_cross_entropy(leaf, target, torch.distributed.group.WORLD)
    weights = torch.linspace(0.1, 1, target.numel(), dtype=loss.dtype).view_as(target)
    return loss, torch.autograd.grad((loss * weights).sum(), leaf)[0]


def dense_loss_and_gradient(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(leaf.flatten(0, -2), target.flatten(), reduction="none").view_as(target)
    weights = torch.linspace(0.1, 1, target.numel(), dtype=loss.dtype).view_as(target)
    return loss, torch.autograd.grad((loss * weights).sum(), leaf)[0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (5, 2, 33), (17, 3, 1000)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2**-8)],
)
@pytest.mark.parametrize("tile", [1, 100, 1 << 18])
def test_loss_and_gradient_equal_the_fp64_twin(
    monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: torch.dtype, tolerance: float, tile: int
):
    monkeypatch.setattr(cross_entropy, "TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    logits = (4 * torch.randn(shape)).to(dtype)
    before, target = logits.clone(), torch.randint(shape[-1], shape[:-1])
    loss, gradient = loss_and_gradient(logits, target)
    wanted_loss, wanted_gradient = dense_loss_and_gradient(logits, target)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), wanted_loss, atol=1e-5, rtol=1e-6)
    assert (gradient.double() - wanted_gradient).abs().max() <= tolerance
    assert torch.equal(logits, before), "upstream widens in place, here the logits stay"


def test_huge_and_impossible_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 3.0, 3.0]]).unsqueeze(1)
    loss, gradient = loss_and_gradient(logits, torch.tensor([[1], [2]]))
    torch.testing.assert_close(loss.flatten(), torch.tensor([2e4, 0.6931472]))
    assert gradient.isfinite().all()


def test_a_non_contiguous_input_gives_the_same():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 6, 11).transpose(0, 1), torch.randint(11, (6, 2))
    found, wanted = (loss_and_gradient(x, target) for x in (logits, logits.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_patch_equals_upstream_and_leaves_label_smoothing_to_it():
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    torch.manual_seed(2)
    logits, target = torch.randn(9, 2, 50), torch.randint(50, (9, 2))
    upstream = tiled_cross_entropy.PATCH.original()
    assert vocab_parallel_cross_entropy is not upstream
    for smoothing in (0.0, 0.1):
        found = vocab_parallel_cross_entropy(logits.clone(), target, smoothing)
        torch.testing.assert_close(found, upstream(logits.clone(), target, smoothing))
