"""K2MLASelfAttention: rotation, packing, recomputation and what it corrects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import yarn as yarn_twin
from tests.reference.attention import dense_causal_attention, dense_rms_norm
from tests.unit.model.tiny import build_attention, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def config(**changes: Any) -> Any:
    return tiny_config(num_layers=1, moe_layer_freq=[0], num_moe_experts=None, **changes)


def attention_of(**changes: Any) -> Any:
    attention = build_attention(config(**changes))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return attention


def rotated(x: Tensor, config: Any) -> Tensor:
    """Rotate [tokens, heads, width] in fp64: neighbours are a pair, the result is halves."""
    frequencies = torch.tensor(
        yarn_twin.inv_freq(
            x.size(-1),
            config.rotary_base,
            config.rotary_scaling_factor,
            config.original_max_position_embeddings,
            config.beta_fast,
            config.beta_slow,
        ),
        dtype=torch.float64,
    )
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies)[:, None]
    pairs = torch.polar(torch.ones_like(angles), angles) * torch.view_as_complex(
        x.double().unflatten(-1, (-1, 2)).contiguous()
    )
    return torch.cat((pairs.real, pairs.imag), -1)


def dense_mla(attention: Any, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The whole layer in fp64 for one row of packed sequences, [tokens, hidden]."""
    c = attention.config
    weight = {name: p.double() for name, p in attention.named_parameters()}
    x = hidden.double()
    latent, rotary = (x @ weight["linear_kv_down_proj.weight"].T).split(
        [c.kv_lora_rank, c.qk_pos_emb_head_dim], -1
    )
    if c.q_lora_rank is None:
        query = x @ weight["linear_q_proj.weight"].T
    else:
        down = x @ weight["linear_q_down_proj.weight"].T
        down = dense_rms_norm(down, weight["q_layernorm.weight"], c.layernorm_epsilon)
        query = down @ weight["linear_q_up_proj.weight"].T
    latent = dense_rms_norm(latent, weight["kv_layernorm.weight"], c.layernorm_epsilon)
    up = (latent @ weight["linear_kv_up_proj.weight"].T).unflatten(-1, (c.num_attention_heads, -1))
    key, value = up.split([c.qk_head_dim, c.v_head_dim], -1)
    query = query.unflatten(-1, (c.num_attention_heads, -1))
    q_plain, q_rotary = query.split([c.qk_head_dim, c.qk_pos_emb_head_dim], -1)
    outputs = []
    for part in torch.arange(len(x)).split(list(lengths)):
        k_rotary = rotated(rotary[part, None], c).expand(-1, c.num_attention_heads, -1)
        q = torch.cat((q_plain[part], rotated(q_rotary[part], c)), -1)
        k = torch.cat((key[part], k_rotary), -1)
        scale = yarn_twin.softmax_scale(q.size(-1), c.rotary_scaling_factor, c.mscale_all_dim)
        outputs.append(dense_causal_attention(q, k, value[part], scale, (len(part),)))
    return torch.cat(outputs).flatten(1) @ weight["linear_proj.weight"].T


@pytest.mark.parametrize("q_lora_rank", [26, None])
@pytest.mark.parametrize("tokens", [1, 41])
def test_layer_equals_its_fp64_twin(q_lora_rank: int | None, tokens: int) -> None:
    attention = attention_of(q_lora_rank=q_lora_rank)
    hidden = torch.randn(tokens, 2, 48)
    found, _ = attention(hidden, None)
    for sample in range(2):
        expected = dense_mla(attention, hidden[:, sample], (tokens,))
        torch.testing.assert_close(found[:, sample].double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_fp64_twins() -> None:
    attention = attention_of()
    hidden = torch.randn(33, 1, 48, requires_grad=True)
    upstream = torch.randn(33, 48)
    attention(hidden, None)[0][:, 0].backward(upstream)
    found = {name: p.grad.clone() for name, p in attention.named_parameters()}
    found["hidden"] = hidden.grad.clone()
    attention.zero_grad()
    hidden.grad = None
    dense_mla(attention, hidden[:, 0], (33,)).backward(upstream.double())
    for name, parameter in (*attention.named_parameters(), ("hidden", hidden)):
        error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize(
    "longest", [17, 30]
)  # 30: the pack's length, where upstream offsets angles
def test_packed_sequences_restart_their_positions(longest: int) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    attention = attention_of()
    hidden = torch.randn(30, 1, 48)
    cu_seqlens = torch.tensor([0, 12, 13, 30], dtype=torch.int32)
    packed = PackedSeqParams(
        "thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    found, _ = attention(hidden, None, packed_seq_params=packed)
    expected = dense_mla(attention, hidden[:, 0], (12, 1, 17))
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_rotation_at_once_changes_no_bit_of_document_by_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_k2.model import mla

    def gradients() -> list[Tensor]:
        attention = attention_of()
        hidden = torch.randn(12, 1, attention.config.hidden_size, requires_grad=True)
        places = torch.tensor([0, 5, 6, 6, 12], dtype=torch.int32)  # one of them is empty
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=places, cu_seqlens_kv=places,
            max_seqlen_q=6, max_seqlen_kv=6,
        )  # fmt: skip
        output, _ = attention(hidden, None, packed_seq_params=packed)
        output.square().sum().backward()
        return [output, *(p.grad for p in attention.parameters()), hidden.grad]  # type: ignore[list-item]

    at_once = gradients()
    monkeypatch.setattr(mla, "_places", lambda packed: None)
    one_by_one = gradients()
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))


@pytest.mark.parametrize("modules", [["core_attn"], ["mla_up_proj"], ["core_attn", "mla_up_proj"]])
def test_selective_recomputation_changes_no_bit(modules: list[str]) -> None:
    hidden = torch.randn(29, 2, 48)
    results = []
    for changes in (dict(), dict(recompute_granularity="selective", recompute_modules=modules)):
        attention = attention_of(**changes)
        x = hidden.clone().requires_grad_()
        output, _ = attention(x, None)
        output.backward(torch.ones_like(output))
        grads = [p.grad for p in attention.parameters()]
        results.append([output, x.grad, attention.core_attention.max_attention_logits, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_plain_rope_has_no_mscale() -> None:
    attention = attention_of(rope_type="rope")
    assert attention.softmax_scale == attention.core_attention.softmax_scale == 32**-0.5


def test_attention_is_a_true_subclass_with_k2s_leaves() -> None:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from megatron_k2.model.core_attention import K2CoreAttention
    from megatron_k2.model.norm import K2RMSNorm

    attention = attention_of()
    assert isinstance(attention, MLASelfAttention)
    assert isinstance(attention.core_attention, K2CoreAttention)
    assert isinstance(attention.q_layernorm, K2RMSNorm)
    assert isinstance(attention.kv_layernorm, K2RMSNorm)
    assert not hasattr(attention_of(q_lora_rank=None), "q_layernorm")


def test_layers_share_one_table_of_angles() -> None:
    first, second = attention_of(), attention_of()
    (a, _), (b, _) = (layer.rotary_pos_emb(40) for layer in (first, second))
    assert a is b and not first.rotary_pos_emb.state_dict()


def test_model_without_k2_attention_has_no_factor_to_change() -> None:
    from megatron_k2.model.rotary import set_yarn_factor_

    with pytest.raises(ValueError, match="no YaRN attention"):
        set_yarn_factor_(torch.nn.Linear(2, 2), 8.0)
    with pytest.raises(ValueError, match=r"--rotary-scaling-factor 0\.5"):
        set_yarn_factor_(attention_of(), 0.5)
