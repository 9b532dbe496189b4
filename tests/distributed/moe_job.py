"""Jobs on K2's MoE layer under expert and expert-tensor parallelism (run by the worker pool)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.unit.model.tiny import tiny_config

LAYER = 2


def build_layer(fields: dict[str, Any]) -> Any:
    """Build the K2 MoE layer for the current layout."""
    from megatron_k2.model.moe import get_k2_moe_spec

    config = tiny_config(**fields)
    layer = get_k2_moe_spec(config, use_transformer_engine=False)(config=config, layer_number=LAYER)
    layer.set_layer_number(LAYER)
    return layer


def whole_parameters(layer: Any) -> dict[str, Tensor]:
    """Gather the expert weights and gradients of all ranks, expert and ffn parts in order."""
    found = {}
    for name, module in (("fc1", layer.experts.linear_fc1), ("fc2", layer.experts.linear_fc2)):
        for kind, value in (("weight", module.weight.detach()), ("grad", module.weight.grad)):
            found[f"{name}.{kind}"] = _whole(module, value)
    return found


def _whole(module: Any, value: Tensor) -> Tensor:
    dim, stride = module.partition_dim, module.stride
    parts = _gather(value, module.tp_group)
    slices = [part.chunk(stride, dim) for part in parts]
    value = torch.cat([piece[index] for index in range(stride) for piece in slices], dim)
    return torch.cat(_gather(value, module.ep_group), 0)


def _gather(value: Tensor, group: Any) -> list[Tensor]:
    value = value.detach()
    parts = [torch.empty_like(value) for _ in range(group.size())]
    torch.distributed.all_gather(parts, value.contiguous(), group=group)
    return parts


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return fp32 numpy arrays, which the pool can send."""
    return {name: value.detach().float().numpy() for name, value in tensors.items()}


def moe_step(fields: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Run one forward and backward on tokens that are split over all ranks.

    Returns:
        the whole output and input gradient, whole expert weights and their gradients, as numpy,
        and whether expert weights are reduced over the expert-data-parallel group.
    """
    torch.manual_seed(0)
    layer = build_layer(fields)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = layer.config.params_dtype
    generator = torch.Generator().manual_seed(5)
    layer.router.weight.data.copy_(torch.randn(layer.router.weight.shape, generator=generator))
    x = torch.randn(tokens, 1, 48, generator=generator)
    grad = torch.randn(tokens, 1, 48, generator=generator)
    x, grad = x.chunk(size)[rank], grad.chunk(size)[rank]
    x = x.to(dtype).requires_grad_()
    out, _ = layer(x)
    out.backward(grad.to(dtype))
    world = torch.distributed.group.WORLD
    found = whole_parameters(layer)
    found["output"] = torch.cat(_gather(out.detach(), world))
    found["grad_input"] = torch.cat(_gather(x.grad, world))
    return as_numpy(found) | {"is_reduced_apart": not layer.experts.linear_fc1.weight.allreduce}


def save_experts(fields: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save the experts' sharded state with this layout; return the whole weights."""
    from megatron.core import dist_checkpointing

    torch.manual_seed(0)
    layer = build_layer(fields)
    dist_checkpointing.save(layer.experts.sharded_state_dict(prefix="experts."), folder)
    modules = (layer.experts.linear_fc1, layer.experts.linear_fc2)
    return as_numpy({type(m).__name__: _whole(m, m.weight) for m in modules})


def load_experts(fields: dict[str, Any], folder: str) -> dict[str, Any]:
    """Load the experts' sharded state into this layout; return the whole weights."""
    from megatron.core import dist_checkpointing

    layer = build_layer(fields)
    modules = (layer.experts.linear_fc1, layer.experts.linear_fc2)
    for module in modules:
        module.weight.data.zero_()
    loaded = dist_checkpointing.load(layer.experts.sharded_state_dict(prefix="experts."), folder)
    layer.experts.load_state_dict({k.removeprefix("experts."): v for k, v in loaded.items()})
    return as_numpy({type(m).__name__: _whole(m, m.weight) for m in modules})
