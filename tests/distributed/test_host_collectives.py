"""Gloo gathers and reduce-scatters shares of different sizes, through Megatron's own mappings."""

import pytest
import torch

from tests.distributed.pool import Pool


@pytest.mark.parametrize("rows", [[2, 5, 0], [1, 1, 4]])
def test_uneven_shares_are_gathered_and_summed(pool: Pool, rows):
    ranks = pool.run("tests.distributed.group_jobs:uneven_exchange", 3, kwargs=dict(rows=rows))
    whole = torch.cat([torch.full((count, 3), rank + 1.0) for rank, count in enumerate(rows)])
    summed = (torch.arange(sum(rows) * 3.0).view(-1, 3) * 6).split(rows)  # 1 + 2 + 3
    for rank, found in enumerate(ranks):
        assert torch.equal(found["gathered"], whole)
        assert torch.equal(found["reduced"], summed[rank])
        assert len(found["refusals"]) == 2
        assert all("synchronous only" in refusal for refusal in found["refusals"])
