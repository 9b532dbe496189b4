"""A discarded output gets its recomputed bytes back on the host, without a compiler."""

from __future__ import annotations

import torch

import megatron_k2

megatron_k2.register("cpu")


def test_every_view_of_a_discarded_output_sees_the_recomputed_bytes() -> None:
    from megatron.core.tensor_parallel import random

    output = torch.arange(6.0).view(2, 3)
    view, version = output.flatten()[2:], output._version
    output.untyped_storage().resize_(0)
    random._get_share_storage()(output, torch.arange(6.0).view(2, 3) + 1)
    assert view.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert output._version == version
