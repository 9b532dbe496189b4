"""The tiled cross entropy over a vocabulary that two or four ranks share."""

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.pool import Pool

JOB = "tests.distributed.group_jobs:split_vocabulary"


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_vocabulary_gives_the_whole_ones_loss_and_gradient(pool: Pool, ranks):
    layout = dict(tensor_model_parallel_size=ranks)
    results = pool.run(JOB, ranks, layout=layout, kwargs=dict(shape=(7, 3, 64)))
    logits, target = results[0]["whole"]
    leaf = logits.requires_grad_()
    loss = F.cross_entropy(leaf.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    gradient = torch.autograd.grad(loss.mean(), leaf)[0]
    for name in ("ours", "upstream"):
        for result in results:
            torch.testing.assert_close(result[name][0], loss.detach())
        found = torch.cat([result[name][1] for result in results], -1)
        torch.testing.assert_close(found, gradient)
