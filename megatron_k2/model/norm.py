"""RMSNorm for every device, with sequence parallelism.

Upstream's local norm (``megatron.core.transformer.torch_norm.WrappedTorchNorm``) refuses sequence
parallelism, which training experts under tensor parallelism needs. Statistics and products are in
fp32 and the result is rounded once. On the CPU a backward pass of our own replaces torch's chain
of small kernels (half of its time at 2,048 x 256, bf16); on CUDA torch's own is fused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm over the last axis with fp32 (or wider) arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        mean_square = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_()
        inverse_rms = mean_square.div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_wide * inverse_rms).mul_(weight.to(wide)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse_rms = ctx.saved_tensors
        wide = inverse_rms.dtype
        normed = x.to(wide) * inverse_rms
        d_out = grad_output.to(wide)
        product = d_out * normed
        grad_weight = product.flatten(0, -2).sum(0)
        weight_wide = weight.to(wide)
        projection = torch.mv(product.flatten(0, -2), weight_wide).div_(x.size(-1))
        grad_x = (d_out * weight_wide).sub_(normed.mul_(projection.view_as(inverse_rms)))
        return grad_x.mul_(inverse_rms).to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of ``x`` [..., width] to unit mean square, then by ``weight`` [width].

    Returns:
        [..., width] in the dtype of ``x``; the arithmetic is fp32, or fp64 for fp64 inputs.
    """
    if x.is_cuda:
        return torch.nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return cast("Tensor", _RMSNormFunction.apply(x, weight, eps))


class K2RMSNorm(torch.nn.Module):
    """RMSNorm with Megatron's builder signature (``LayerNormBuilder``).

    Args:
        config: ``sequence_parallel`` marks the weight so that its gradient is summed over the
            tensor-parallel group; ``layernorm_zero_centered_gamma`` stores the weight minus one.
        hidden_size: width of the last axis; the weight is [hidden_size], whole on every rank.
        eps: added to the mean square.

    Raises:
        ValueError: ``config.normalization`` is not RMSNorm.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"--normalization {config.normalization} is not supported by the K2 layer spec; "
                "use --normalization RMSNorm"
            )
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the effective scale to one."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]; keeps shape and dtype.

        Under sequence parallelism ``x`` holds this rank's tokens; no communication.
        """
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return rms_norm(x, weight, self.eps)
