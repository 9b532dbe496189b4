"""Offloaded activations change no bit, whatever the layout, schedule and number format.

Two to eight microbatches a step (1F1B and interleaved); two steps, of which upstream's first takes
down what it will offload; then an evaluation of ten microbatches, more than a step has, and one
step more.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.matrix import UNEVEN_PP4, VPP2, Case, evidence_apart, layout_of, merge
from tests.distributed.pool import Pool

TRAIN = "tests.distributed.offload_job:train_offloaded"
OFFLOADING: dict[str, Any] = dict(
    fine_grained_activation_offloading=True,
    offload_modules=[
        "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act",
    ],
    min_offloaded_tensor_size=0,
)  # fmt: skip
RECOMPUTED = dict(
    recompute_granularity="selective",
    recompute_modules=["layernorm", "mla_up_proj"],
)
PACKED = dict(k2_fp8_activations=["moe_up_proj_input", "swiglu_input"])
OVERLAPPED = dict(overlap_moe_expert_parallel_comm=True, bf16=True)
CASES = {
    "PP2": (Case("", 2, layout_of(pp=2), micro_batch_size=2), {}),
    # One layer a chunk: the last groups of a microbatch stay, and upstream took it for finished.
    "PP2 x VPP2": (Case("", 2, VPP2, micro_batch_size=2), {}),
    "EP2 ZeRO-1, packed": (Case("", 2, layout_of(ep=2), True, micro_batch_size=2), PACKED),
    "TP2 SP, recomputed": (Case("", 2, layout_of(tp=2), micro_batch_size=4), RECOMPUTED),
    "PP4 uneven": (Case("", 4, UNEVEN_PP4), {}),
    "EP2 overlapped": (Case("", 2, layout_of(ep=2)), OVERLAPPED),
    # What examples/kimi_k2_1t/recipe.toml asks for at once.
    "EP2 overlapped, as the script": (
        Case("", 2, layout_of(ep=2)),
        {
            **OVERLAPPED, **PACKED, "delay_wgrad_compute": True, "moe_grouped_gemm": True,
            "recompute_granularity": "selective",
            "recompute_modules": ["layernorm", "mla_up_proj", "moe_act"],
        },
    ),
    "TP2 x PP2 x EP2 ZeRO-1": (
        Case("", 8, layout_of(tp=2, pp=2, ep=2, etp=1), True, micro_batch_size=2),
        {**RECOMPUTED, **PACKED},
    ),
}  # fmt: skip
WIDE = {
    "PP2",
    "EP2 ZeRO-1, packed",
    "TP2 SP, recomputed",
    "PP4 uneven",
    "EP2 overlapped",
    "EP2 overlapped, as the script",
    "TP2 x PP2 x EP2 ZeRO-1",
}


def train(pool: Pool, case: Case, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's record of a run with these configuration fields."""
    fields = dict(fields)
    run = dict(
        layout=case.layout, num_steps=2, digest=True, micro_batch_size=case.micro_batch_size,
        use_distributed_optimizer=case.use_distributed_optimizer, bf16=fields.pop("bf16", False),
    )  # fmt: skip
    return pool.run(TRAIN, case.world_size, kwargs=dict(run=run, overrides=fields))


@pytest.mark.parametrize("name", evidence_apart(CASES, WIDE))
def test_offloaded_run_equals_the_plain_one_bit_for_bit(pool: Pool, name: str) -> None:
    case, fields = CASES[name]
    plain = train(pool, case, fields)
    offloaded = train(pool, case, {**fields, **OFFLOADING})
    assert merge(offloaded) == merge(plain)
    assert merge(plain).losses[-1] < merge(plain).losses[0]
    for rank, other in zip(offloaded, plain, strict=True):
        assert rank["evaluated"] == other["evaluated"]
        assert rank["lent_bytes"] == 0
    assert any(rank["offloaded_bytes"] for rank in offloaded)
