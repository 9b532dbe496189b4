"""Jobs on K2's attention under tensor parallelism (run by the worker pool)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_k2 import parallel

# Dimension over which tensor-parallel ranks share a weight; None: every rank holds it whole.
SPLIT_DIM = {
    "linear_q_proj": 0,
    "linear_q_down_proj": 0,
    "linear_q_up_proj": 0,
    "linear_kv_down_proj": 0,
    "linear_kv_up_proj": 0,
    "linear_proj": 1,
}


def whole_state(attention: torch.nn.Module) -> dict[str, Tensor]:
    """Return reproducible whole weights for an attention built without tensor parallelism."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(value.shape, generator=generator) * (0.2 if value.ndim > 1 else 1.0)
        for name, value in attention.named_parameters()
    }


def load_share_(attention: torch.nn.Module, state: dict[str, Tensor], rank: int, size: int) -> None:
    """Copy this rank's share of every whole weight."""
    for name, parameter in attention.named_parameters():
        dim = SPLIT_DIM.get(name.split(".")[0])
        share = state[name] if dim is None else state[name].chunk(size, dim)[rank]
        parameter.data.copy_(share)


def whole_gradients(attention: torch.nn.Module, group: Any) -> dict[str, Tensor]:
    """Return gradients as the optimizer would see them: shares joined, marked ones summed.

    Raises:
        AssertionError: ranks that hold the same weight have different gradients.
    """
    found = {}
    for name, parameter in attention.named_parameters():
        grad = parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(grad, group=group)  # finalize_model_grads
        shares = [torch.empty_like(grad) for _ in range(group.size())]
        torch.distributed.all_gather(shares, grad.contiguous(), group=group)
        dim = SPLIT_DIM.get(name.split(".")[0])
        if dim is None:
            assert all(torch.allclose(share, shares[0]) for share in shares), name
        found[name] = shares[0] if dim is None else torch.cat(shares, dim)
    return found


def attention_step(
    fields: dict[str, Any], state: dict[str, Any] | None = None, stock: bool = False
) -> dict[str, Any]:
    """Run one forward and backward of an MLA layer; return whole results as numpy.

    Args:
        fields: of ``K2TransformerConfig``.
        state: whole weights; None makes them (without tensor parallelism).
        stock: use upstream's ``MLASelfAttention`` around K2's core attention and norms.
    """
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.spec_utils import build_module

    from megatron_k2.model.config import K2TransformerConfig
    from megatron_k2.model.specs import get_k2_layer_specs

    group = parallel.get_pg_collection().tp
    rank, size = group.rank(), group.size()
    config = K2TransformerConfig(tensor_model_parallel_size=size, **fields)
    spec = get_k2_layer_specs(config).layer_specs[0].submodules.self_attention
    if stock:
        spec.module = MLASelfAttention
    attention = build_module(spec, config=config, layer_number=1)
    if state is None:
        whole = whole_state(attention)
    else:
        whole = {name: torch.from_numpy(value) for name, value in state.items()}
    load_share_(attention, whole, rank, size)
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(24, 2, config.hidden_size, generator=generator)
    upstream = torch.randn(24, 2, config.hidden_size, generator=generator)
    if config.sequence_parallel:
        hidden, upstream = (x.chunk(size)[rank].clone() for x in (hidden, upstream))
    hidden.requires_grad_()
    output, _ = attention(hidden, None)
    output.backward(upstream)
    parts = [output.detach(), hidden.grad]
    if config.sequence_parallel:
        parts = [joined(part, group) for part in parts]
    recorded = attention.core_attention.max_attention_logits
    return dict(
        state={name: value.numpy() for name, value in whole.items()},
        output=parts[0].numpy(),
        grad_hidden=parts[1].numpy(),
        gradients={n: g.numpy() for n, g in whole_gradients(attention, group).items()},
        max_logits=joined(recorded, group).numpy(),
    )


def joined(part: Tensor, group: Any) -> Tensor:
    """Join the ranks' shares along the first dimension."""
    shares = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(shares, part.contiguous(), group=group)
    return torch.cat(shares)
