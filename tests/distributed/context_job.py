"""Jobs on K2's attention under context parallelism (run by the worker pool)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_k2 import parallel
from tests.distributed.attention_job import joined, load_share_, whole_gradients, whole_state

TOKENS, BATCH = 48, 2


class ContextBytes(TorchDispatchMode):
    """Counts the bytes that the collectives of one group are given, by kind.

    Of all-gathers and reduce-scatters of one tensor. An all-gather is given a rank's part and a
    reduce-scatter the whole; of both, every rank sends a part to every other one.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.name = group.group_name
        self.given: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and pass on."""
        if func.namespace == "c10d":
            place = [one.name for one in func._schema.arguments].index("process_group")
            if torch.distributed.ProcessGroup.unbox(args[place]).group_name == self.name:
                self.given[func._schema.name.removeprefix("c10d::")] += args[1].nbytes
        return func(*args, **(kwargs or {}))


def places_of(rank: int, size: int, length: int = TOKENS) -> Tensor:
    """Return the tokens of a rank by Megatron's own cut of a batch's positions."""
    from megatron.core.utils import _get_batch_on_this_cp_rank_per_sequence_balancing as cut

    group = parallel.get_pg_collection().cp
    assert (rank, size) == (group.rank(), group.size())
    return cut({"positions": torch.arange(length)[None]}, group)["positions"][0]


def attention_of(fields: dict[str, Any], state: dict[str, Any] | None = None) -> Any:
    """Return an MLA layer with this rank's share of the weights, and the whole weights."""
    from megatron.core.transformer.spec_utils import build_module

    from megatron_k2.model.config import K2TransformerConfig
    from megatron_k2.model.specs import get_k2_layer_specs

    groups = parallel.get_pg_collection()
    config = K2TransformerConfig(
        tensor_model_parallel_size=groups.tp.size(), context_parallel_size=groups.cp.size(),
        **fields,
    )  # fmt: skip
    spec = get_k2_layer_specs(config).layer_specs[0].submodules.self_attention
    attention = build_module(spec, config=config, layer_number=1)
    whole = whole_state(attention)
    if state is not None:
        whole = {name: torch.from_numpy(value) for name, value in state.items()}
    load_share_(attention, whole, groups.tp.rank(), groups.tp.size())
    return attention, whole


def mask_of(kind: str | None) -> Tensor | None:
    """Return a whole mask: none, the plain causal one, or that of two documents."""
    if kind is None:
        return None
    mask = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    if kind == "documents":
        mask[1, :, 29:, :29] = True
    return mask


def packed_of(bounds: list[int] | None) -> Any:
    """Return the places of packed documents."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if bounds is None:
        return None
    places = torch.tensor(bounds, dtype=torch.int32)
    longest = int(places.diff().max())
    return PackedSeqParams("thd", places, places, max_seqlen_q=longest, max_seqlen_kv=longest)


def context_step(
    fields: dict[str, Any],
    state: dict[str, Any] | None = None,
    mask: str | None = None,
    bounds: list[int] | None = None,
) -> dict[str, Any]:
    """Run one forward and backward of an MLA layer; return whole results as numpy.

    Args:
        fields: of ``K2TransformerConfig``.
        state: whole weights; None makes them (without tensor parallelism).
        mask: of ``mask_of``.
        bounds: places of packed documents, which make one row.
    """
    groups = parallel.get_pg_collection()
    attention, whole = attention_of(fields, state)
    generator = torch.Generator().manual_seed(11)
    batch = BATCH if bounds is None else 1
    width = attention.config.hidden_size
    hidden, upstream = (torch.randn(TOKENS, batch, width, generator=generator) for _ in range(2))
    places = places_of(groups.cp.rank(), groups.cp.size())
    hidden, upstream = hidden[places], upstream[places]
    if attention.config.sequence_parallel:
        hidden, upstream = (
            x.chunk(groups.tp.size())[groups.tp.rank()].clone() for x in (hidden, upstream)
        )
    hidden.requires_grad_()
    rows = mask_of(mask)
    rows = None if rows is None else rows[:, :, places]
    with ContextBytes(groups.cp) as traffic:
        output, _ = attention(hidden, rows, packed_seq_params=packed_of(bounds))
        output.backward(upstream)
    for parameter in attention.parameters():
        torch.distributed.all_reduce(parameter.grad, group=groups.cp)
    maxima = attention.core_attention.max_attention_logits
    torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=groups.cp)
    parts = [output.detach(), hidden.grad]
    if attention.config.sequence_parallel:
        parts = [joined(part, groups.tp) for part in parts]
    order = joined(places, groups.cp).argsort()
    parts = [joined(part, groups.cp)[order] for part in parts]
    return dict(
        state={name: value.numpy() for name, value in whole.items()},
        output=parts[0].numpy(),
        grad_hidden=parts[1].numpy(),
        gradients={n: g.numpy() for n, g in whole_gradients(attention, groups.tp).items()},
        max_logits=joined(maxima, groups.tp).numpy(),
        given=dict(traffic.given),
    )


def context_bytes(
    preset: str, world_size: int, tokens: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """Run a preset's attention layer on rank 0 of a fake world, with tensors of shapes alone.

    Returns:
        bytes given to the collectives of one layer, forward and backward, and the bytes of this
        rank's keys and values that they stand for.
    """
    from megatron.core.transformer.spec_utils import build_module
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_k2.model.specs import get_k2_layer_specs
    from megatron_k2.planning.stage import enter_fake_world, preset_config

    groups = enter_fake_world(0, world_size, **sizes)
    config = preset_config(
        preset, bf16=True, params_dtype=torch.bfloat16, sequence_parallel=groups.tp.size() > 1,
        recompute_granularity=None, fine_grained_activation_offloading=False, **sizes,
    )  # fmt: skip
    with FakeTensorMode():
        spec = get_k2_layer_specs(config, pp_rank=0).layer_specs[0].submodules.self_attention
        attention = build_module(spec, config=config, layer_number=1)
        expanded: list[int] = []
        seen = attention._run_core_attention

        def measured(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            expanded.append((key.nbytes + value.nbytes) // groups.cp.size())
            return seen(query, key, value, *args, **kwargs)

        attention._run_core_attention = measured
        mine = tokens // groups.cp.size() // groups.tp.size()
        hidden = torch.randn(mine, 1, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with ContextBytes(groups.cp) as traffic:
            output, _ = attention(hidden, None)
            output.sum().backward()
    return dict(given=dict(traffic.given), expanded=expanded)
