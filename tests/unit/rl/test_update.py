"""The optimizer's reset: what it remembers of gradients goes, what it holds of weights stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_k2.rl.update import reset_moments_


def adam_after(num_steps: int, weight: torch.Tensor) -> torch.optim.Adam:
    """An Adam that has taken steps."""
    adam = torch.optim.Adam([weight], lr=0.1)
    for _ in range(num_steps):
        weight.grad = torch.full_like(weight, 2.0)
        adam.step()
    return adam


def test_a_reset_optimizer_goes_on_like_a_fresh_one_from_the_same_weights() -> None:
    used = torch.ones(3, requires_grad=True)
    adam = adam_after(5, used)
    master = torch.arange(3.0)
    adam.state[used]["master_param"] = master.clone()  # as precision-aware optimizers keep it
    adam.param_groups[0]["step"] = 5  # as MuonClip counts
    inner: Any = SimpleNamespace(optimizer=adam)
    chained: Any = SimpleNamespace(chained_optimizers=[inner], param_groups=adam.param_groups)
    before = used.detach().clone()
    reset_moments_(chained)
    assert torch.equal(used, before) and torch.equal(adam.state[used]["master_param"], master)
    assert adam.param_groups[0]["step"] == 0
    fresh = before.clone().requires_grad_()
    other = torch.optim.Adam([fresh], lr=0.1)
    for weight, one in ((used, adam), (fresh, other)):
        weight.grad = torch.tensor([1.0, -3.0, 0.5])
        one.step()
    assert torch.equal(used, fresh)
