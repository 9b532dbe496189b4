"""Discarded outputs are recomputed without Transformer Engine, with equal gradients."""

from __future__ import annotations

import torch

import megatron_k2

megatron_k2.register("cpu")


def test_recomputed_output_gives_the_same_gradients() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    def run(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(5, 8, requires_grad=True)
        weight = torch.randn(8, requires_grad=True)
        head = torch.randn(8, 3, requires_grad=True)

        def norm(inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(inputs, (8,), weight)

        if recompute:
            checkpoint = CheckpointWithoutOutput()
            normed = checkpoint.checkpoint(norm, x)
            output = normed @ head
            checkpoint.discard_output_and_register_recompute(output)
            assert normed.untyped_storage().size() == 0
        else:
            output = norm(x) @ head
        output.square().sum().backward()
        return [x.grad, weight.grad, head.grad]

    for kept, recomputed in zip(run(False), run(True), strict=True):
        assert torch.equal(kept, recomputed)
