"""Our context parallelism around Transformer Engine's attention, as far as no kernel is needed.

Checked: how the leaf is built, what it is called with, and that the mask types it is given mean in
Transformer Engine's own Python (its masks, its unfused attention) what ours mean. Its linears are
replaced by their shapes. Not run: any kernel, hence no number of a real forward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_engine.pytorch.attention.dot_product_attention.backends import (
    UnfusedDotProductAttention,
)

from megatron_k2.planning.stage import enter_fake_world
from tests.reference.attention import dense_causal_attention
from tests.te.modules import build

SIZE, TOKENS = 4, 64
META = torch.device("meta")


def attention_of(rank: int = 1, **fields: Any) -> Any:
    """Return the first attention layer of k2-micro, as a context-parallel rank builds it."""
    groups = enter_fake_world(rank, SIZE, context_parallel_size=SIZE)
    model = build("k2-micro", None, groups, context_parallel_size=SIZE, **fields)
    return model.decoder.layers[0].self_attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what Transformer Engine's attention is called with, in place of its kernels."""
    found: list[dict[str, Any]] = []

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
        shapes = [tuple(x.shape) for x in (query, key, value)]
        assert all(x.is_contiguous() for x in (query, key, value))
        found.append(dict(kwargs, shapes=shapes, cp_group=self.cp_group, mask=mask))
        return query.new_empty(*query.shape[:-2], query.size(-2) * value.size(-1))

    monkeypatch.setattr(te.DotProductAttention, "forward", forward)
    return found


def shapes_for_kernels_(attention: Any) -> None:
    """Let every linear of a layer return a tensor of its output's shape."""
    for module in attention.children():
        if hasattr(module, "out_features"):
            width = module.out_features
            module.forward = lambda x, width=width: (x.new_empty(*x.shape[:-1], width), None)


def test_transformer_engine_is_built_without_context_parallelism() -> None:
    attention = attention_of()
    leaf = attention.core_attention
    assert attention.config.context_parallel_size == SIZE
    assert attention.pg_collection.cp.size() == SIZE
    assert leaf.config.context_parallel_size == 1
    assert leaf.cp_group is None and leaf.attention_type == "cross"
    assert leaf.softmax_scale == attention.softmax_scale == leaf.unfused_attention.softmax_scale


def test_expanded_exchange_leaves_it_to_transformer_engine() -> None:
    with pytest.raises(ValueError, match="use --k2-context-exchange latent, or add"):
        attention_of(k2_context_exchange="expanded")
    attention = attention_of(
        k2_context_exchange="expanded", k2_max_attention_logit=False, cp_comm_type="all_gather"
    )
    leaf = attention.core_attention
    assert not attention.gathers_latents
    assert leaf.cp_group is attention.pg_collection.cp and leaf.cp_comm_type == "all_gather"


def test_whole_layer_calls_it_once_a_chunk_with_the_keys_up_to_it(calls: list[Any]) -> None:
    attention = attention_of(rank=1)
    shapes_for_kernels_(attention)
    config, chunk = attention.config, TOKENS // (2 * SIZE)
    hidden = torch.empty(2 * chunk, 3, config.hidden_size, device=META, dtype=torch.bfloat16)
    output, _ = attention(hidden, None)
    assert output.shape == hidden.shape
    heads, width = config.num_attention_heads, config.qk_head_dim + config.qk_pos_emb_head_dim
    assert [call["shapes"] for call in calls] == [
        [(chunk, 3, heads, width), (keys, 3, heads, width), (keys, 3, heads, config.v_head_dim)]
        for keys in (2 * chunk, 7 * chunk)  # rank 1 of 4: chunks 1 and 6
    ]
    assert [call["attn_mask_type"] for call in calls] == ["causal_bottom_right"] * 2
    assert all(call["cp_group"] is None and call["mask"] is None for call in calls)
    assert attention.core_attention.max_attention_logits.shape == (heads,)


def test_the_first_chunk_of_the_first_rank_is_plainly_causal(calls: list[Any]) -> None:
    attention = attention_of(rank=0)
    shapes_for_kernels_(attention)
    hidden = torch.empty(16, 1, attention.config.hidden_size, device=META, dtype=torch.bfloat16)
    attention(hidden, None)
    assert [call["attn_mask_type"] for call in calls] == ["causal", "causal_bottom_right"]


def test_packed_documents_name_their_queries_and_keys_apart(calls: list[Any]) -> None:
    attention = attention_of(rank=1)
    shapes_for_kernels_(attention)
    places = torch.tensor([0, 5, 11, 64], dtype=torch.int32)
    packed = PackedSeqParams("thd", places, places, max_seqlen_q=53, max_seqlen_kv=53)
    hidden = torch.empty(16, 1, attention.config.hidden_size, device=META, dtype=torch.bfloat16)
    with torch.no_grad():  # the record of logits reads places on the host, which is elsewhere here
        output, _ = attention(hidden, None, packed_seq_params=packed)
    assert output.shape == hidden.shape
    first, second = calls  # tokens 8 to 15 and 48 to 55
    assert [call["attn_mask_type"] for call in calls] == ["padding_causal_bottom_right"] * 2
    assert first["cu_seqlens_q"].tolist() == [0, 3, 8]
    assert first["cu_seqlens_kv"].tolist() == [0, 6, 11]  # of token 5 on
    assert second["cu_seqlens_q"].tolist() == [0, 8]
    assert second["cu_seqlens_kv"].tolist() == [0, 45]  # of token 11 on
    assert [(call["max_seqlen_q"], call["max_seqlen_kv"]) for call in calls] == [(5, 6), (8, 45)]
    width = attention.config.qk_head_dim + attention.config.qk_pos_emb_head_dim
    heads = attention.config.num_attention_heads
    assert first["shapes"] == [(8, heads, width), (11, heads, width), (11, heads, width)]
    assert second["shapes"][1:] == [(45, heads, width)] * 2  # values padded by upstream
    assert all(call["cp_group"] is None and call["qkv_format"] == "thd" for call in calls)


class CudaIsCpu(TorchFunctionMode):
    """Makes on the host what asks for a GPU by name, or for the current device (conftest.py)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith(("cuda", "meta")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 12), (1, 9)])
def test_its_bottom_right_is_ours_in_its_own_unfused_attention(queries: int, keys: int) -> None:
    torch.manual_seed(0)
    shapes = [(queries, 2, 3, 8), (keys, 2, 3, 8), (keys, 2, 3, 8)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    unfused = UnfusedDotProductAttention(0.3, attention_type="cross")
    with CudaIsCpu():
        found = unfused(
            {}, q, k, v, qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="causal_bottom_right",
            bottom_right_diagonal=True,
        )  # fmt: skip
    for sample in range(2):
        some = [x[:, sample] for x in (q, k, v)]
        expected = dense_causal_attention_of_last(*some)
        torch.testing.assert_close(found[:, sample].double(), expected, rtol=1e-5, atol=1e-5)


def dense_causal_attention_of_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return dense attention of the last queries of a row, in fp64."""
    whole = torch.cat((q.new_zeros(len(k) - len(q), *q.shape[1:]), q))
    return dense_causal_attention(whole, k, v, 0.3, (len(k),))[-len(q) :].flatten(1)
