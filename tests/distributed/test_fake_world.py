"""The full Kimi K2 builds rank by rank at PP16 x EP16, without the 256 processes."""

import json
import subprocess
import sys
from typing import Any

import pytest

from megatron_k2.compat import distribution_version
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


NUM_STAGES = 16
ALWAYS = (0, 7, 15)  # the others in `make evidence`


def layers_of(stage: int) -> list[int]:
    """Return the numbers, from 1, of a stage's layers: 3, then 4 each, then 2."""
    first = 4 * stage
    return [layer for layer in range(first, first + 4) if 1 <= layer <= 61]


STAGES = pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=[] if stage in ALWAYS else [pytest.mark.evidence])
        for stage in range(NUM_STAGES)
    ],
)


def what_to_build(stage: int) -> dict[str, Any]:
    """Return the arguments of ``build_rank`` for one rank of a pipeline stage."""
    rank = stage * RANKS_A_STAGE + 5
    return dict(rank=rank, world_size=WORLD_SIZE, preset="kimi-k2", layout=LAYOUT)


def check(built: dict[str, Any], stage: int) -> None:
    """Compare a built rank with the released configuration."""
    print(f"stage {stage}: {built['seconds']:.1f} s, of which groups {built['groups_s']:.1f} s")
    assert built["seconds"] < SECONDS_A_RANK
    layers = layers_of(stage)
    assert built["layers"] == layers
    assert built["devices"] == ["meta"]
    vocabulary = int(load_preset("kimi-k2").value("vocab_size")) * 7168
    num_dense, ends = int(stage == 0), int(stage in (0, 15))
    wanted = expected_weights(num_dense, len(layers) - num_dense) + ends * vocabulary
    assert built["num_weights"] == wanted + (7168 if stage == 15 else 0)  # the final norm


@STAGES
def test_stage_of_kimi_k2_builds_in_under_a_minute(pool: Pool, stage):
    (built,) = pool.run(BUILD, 1, kwargs=what_to_build(stage))
    assert "K2GroupedMLP" in built["classes"]
    check(built, stage)


def test_all_ranks_together_hold_every_layer_and_weight_of_kimi_k2():
    layers = [layer for stage in range(NUM_STAGES) for layer in layers_of(stage)]
    assert layers == list(range(1, 62))
    value = load_preset("kimi-k2").value
    hidden, expert = int(value("hidden_size")), 3 * int(value("hidden_size")) * 2048
    dense, moe = expected_weights(1, 0), 60 * expected_weights(0, 1)
    others = 60 * 15 * int(value("num_experts")) // 16 * expert  # experts of the other 15 EP ranks
    ends = 2 * int(value("vocab_size")) * hidden + hidden
    assert dense + moe + others + ends == 1_026_408_209_408


@STAGES
def test_stage_of_kimi_k2_builds_with_transformer_engine(stage):
    if distribution_version("transformer-engine") is None:
        pytest.skip("transformer-engine is not installed: its modules cannot be built")
    what = json.dumps(dict(what_to_build(stage), transformer_impl="transformer_engine"))
    command = [sys.executable, "-m", "tests.distributed.fake_world_job", what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    built = json.loads(output.splitlines()[-1])
    assert "TEGroupedMLP" in built["classes"]
    check(built, stage)
