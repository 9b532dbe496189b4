"""Grouped-query attention that records: the largest logits are those of the dense product."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from tests.distributed.muonclip_models import grouped_query_config

SIZE, BATCH, HEADS, GROUPS, WIDTH = 11, 2, 8, 4, 16


def core(config: Any, mask: AttnMaskType = AttnMaskType.causal) -> Any:
    from megatron_k2.model.grouped_query import GroupedQueryCoreAttention

    return GroupedQueryCoreAttention(config, 1, mask, "self")


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("masked", [False, True])
def test_the_record_is_the_largest_visible_logit_of_each_query_head(masked: bool) -> None:
    attention = core(grouped_query_config())
    query, key, value = (
        torch.randn(SIZE, BATCH, heads, WIDTH, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    hidden = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)
    if masked:
        hidden[:, 2] = True
    mask = hidden[None, None] if masked else None
    attention(query, key, value, mask)
    wanted = torch.full((HEADS,), -torch.inf, dtype=torch.float64)
    for head in range(HEADS):
        for one in range(BATCH):
            q, k = query[:, one, head].double(), key[:, one, head // (HEADS // GROUPS)].double()
            logits = (q @ k.T / WIDTH**0.5).masked_fill(hidden, -torch.inf)
            wanted[head] = max(wanted[head], float(logits.max()))
    found = attention.max_attention_logits
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    attention.eval()
    attention(100 * query, key, value, mask)
    assert torch.equal(found, attention.max_attention_logits), "evaluation does not count"


@pytest.mark.usefixtures("single_process")
def test_what_the_record_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="is causal; found no_mask"):
        core(grouped_query_config(), AttnMaskType.no_mask)
    config = grouped_query_config()
    config.window_size = (4, 0)
    with pytest.raises(ValueError, match="--window-size"):
        core(config)


@pytest.mark.usefixtures("single_process")
def test_every_layer_of_the_spec_records_and_the_stock_spec_is_not_changed() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_k2.model.grouped_query import (
        GroupedQueryCoreAttention,
        get_grouped_query_block_spec,
    )

    config = grouped_query_config()
    block = get_grouped_query_block_spec(SimpleNamespace(transformer=config))
    assert len(block.layer_specs) == 2
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        assert attention.core_attention is GroupedQueryCoreAttention
    stock = get_gpt_layer_local_spec().submodules.self_attention.submodules
    assert stock.core_attention is not GroupedQueryCoreAttention
    config.transformer_impl = "transformer_engine"
    with pytest.raises(ValueError, match="--transformer-impl local"):
        get_grouped_query_block_spec(SimpleNamespace(transformer=config))
