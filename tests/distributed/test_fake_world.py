"""The full Kimi K2 builds rank by rank at PP16 x EP16, without the 256 processes."""

import pytest

from megatron_k2.layouts import propose_pipeline_layout
from megatron_k2.presets import load_preset
from tests.distributed.pool import Pool

WORLD_SIZE = 512  # PP16 x DP32, experts over 16 of the 32: experts' data parallel size is 2
LAYOUT = dict(
    pipeline_model_parallel_size=16,
    expert_model_parallel_size=16,
    pipeline_model_parallel_layout=propose_pipeline_layout(61, 16),
)
RANKS_A_STAGE = WORLD_SIZE // 16
BUILD = "tests.distributed.fake_world_job:build_rank"
SECONDS_A_RANK = 60.0  # the bar


def expected_weights(num_dense: int, num_moe: int) -> int:
    """Weights of one rank's layers, from the released configuration (1 shared expert)."""
    value = {name: field.value for name, field in load_preset("kimi-k2").fields.items()}
    hidden, heads = value["hidden_size"], value["num_attention_heads"]
    q, kv, rope = value["q_lora_rank"], value["kv_lora_rank"], value["qk_pos_emb_head_dim"]
    nope, v_dim = value["qk_head_dim"], value["v_head_dim"]
    attention = hidden * (q + kv + rope) + q * heads * (nope + rope)
    attention += kv * heads * (nope + v_dim) + heads * v_dim * hidden
    norms = 2 * hidden + q + kv
    expert = 3 * hidden * value["moe_ffn_hidden_size"]
    experts = value["num_experts"] // 16 * expert
    shared = 3 * hidden * value["moe_shared_expert_intermediate_size"]
    router = value["num_experts"] * hidden
    dense = 3 * hidden * value["ffn_hidden_size"]
    return (
        (num_dense + num_moe) * (attention + norms)
        + num_dense * dense
        + num_moe * (experts + shared + router)
    )


@pytest.mark.parametrize(
    ("stage", "layers", "ends"),
    [(0, [1, 2, 3], 1), (7, [28, 29, 30, 31], 0), (15, [60, 61], 1)],
)
def test_stage_of_kimi_k2_builds_in_under_a_minute(pool: Pool, stage, layers, ends):
    ((built),) = pool.run(
        BUILD,
        1,
        kwargs=dict(
            rank=stage * RANKS_A_STAGE + 5, world_size=WORLD_SIZE, preset="kimi-k2", layout=LAYOUT
        ),
    )
    print(f"stage {stage}: {built['seconds']:.1f} s, of which groups {built['groups_s']:.1f} s")
    assert built["seconds"] < SECONDS_A_RANK
    assert built["layers"] == layers
    assert built["devices"] == ["meta"]
    vocabulary = int(load_preset("kimi-k2").value("vocab_size")) * 7168
    final_norm = 7168 if stage == 15 else 0
    num_dense = 1 if stage == 0 else 0
    wanted = expected_weights(num_dense, len(layers) - num_dense) + ends * vocabulary + final_norm
    assert built["num_weights"] == wanted
