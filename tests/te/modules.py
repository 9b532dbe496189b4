"""A rank's Transformer Engine modules on the meta device, and which of them run quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_k2.planning.stage import build_stage, enter_fake_world

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


class CudaIsMeta(TorchFunctionMode):
    """Makes on the meta device what asks for a GPU by name: the scales of delayed scaling, and a
    context-parallel rank's places in upstream's rotary tables, which go there from pinned memory.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.cuda:
            return args[0].to("meta")
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def build(preset: str, scope: str | None, groups: Any = None, **fields: Any) -> Any:
    """Build a stage under a scope; None builds it in bf16.

    Args:
        preset: its name.
        scope: of ``recipes.SCOPES``.
        groups: of ``enter_fake_world``; None is a world of one.
        fields: of ``K2TransformerConfig``.
    """
    if scope is not None:
        fields = {
            "fp8": "e4m3", "fp8_recipe": "blockwise", "k2_fp8_scope": scope,
            "fp8_dot_product_attention": scope == "all",
        } | fields  # fmt: skip
    if groups is None:
        groups = enter_fake_world(0, 1)
    with CudaIsMeta():
        return build_stage(groups, preset, transformer_impl="transformer_engine", **fields)


def quantised(model: Any, in_context: bool = True) -> dict[str, bool]:
    """Return, for every TE module that asks the per-module hook, whether it would quantise."""
    return {
        name: module.will_execute_quantized(in_context)
        for name, module in model.named_modules()
        if hasattr(module, "will_execute_quantized")
    }


def linears(layer: int, is_moe: bool) -> tuple[set[str], set[str]]:
    """Return the names of a K2 layer's TE linears: (those of experts, the others)."""
    prefix = f"decoder.layers.{layer}"
    attention = {"q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj"}
    others = {f"{prefix}.self_attention.linear_{name}" for name in attention}
    owners = ("mlp.experts", "mlp.shared_experts") if is_moe else ("mlp",)
    mlps = {f"{prefix}.{owner}.linear_{fc}" for owner in owners for fc in ("fc1", "fc2")}
    return (mlps, others) if is_moe else (set(), others | mlps)
