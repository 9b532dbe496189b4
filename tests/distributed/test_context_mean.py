"""The mean over a row's tokens where its context-parallel ranks hold unequal numbers of them.

Upstream's schedule divides each rank's sum and its DDP averages the ranks; the gradient that comes
out must be one process's, and four plausible mistakes must not pass for it.
"""

from __future__ import annotations

import torch

from tests.distributed.context_mean_job import COUNTS, WIDTH, WRONG, token_losses
from tests.distributed.pool import Pool


def expected() -> dict[str, torch.Tensor]:
    """Return the fp64 gradients of one process: a mean of the rows' means, and of all tokens."""
    weight = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    sums = [
        sum(
            (losses * mask).sum() for losses, mask in (token_losses(weight, row, p) for p in (0, 1))
        )
        for row in (0, 1)
    ]
    counts = [sum(row) for row in COUNTS]
    means = sum(total / count for total, count in zip(sums, counts, strict=True)) / 2
    tokens = sum(sums) / sum(counts)
    return {
        name: torch.autograd.grad(loss, weight, retain_graph=True)[0]
        for name, loss in (("real", means), ("per token", tokens))
    }


def test_unequal_masks_of_context_ranks_give_one_process_its_mean(pool: Pool) -> None:
    layout = dict(context_parallel_size=2)
    ranks = pool.run("tests.distributed.context_mean_job:gradients", 4, layout=layout)
    wanted = expected()
    for found in ranks:
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                torch.tensor(found[name], dtype=torch.float64), gradient, rtol=1e-5, atol=1e-6
            )  # fp32 against fp64
        for name in WRONG:
            off = (torch.tensor(found[name]) - wanted["real"]).norm() / wanted["real"].norm()
            assert off > 0.1, f"{name} passes for the mean"
