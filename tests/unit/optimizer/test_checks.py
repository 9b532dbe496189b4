"""What MuonClip refuses by flag, and what it says at start."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_k2.max_logit import MaxLogitRecord
from megatron_k2.optimizer.checks import refuse_unsupported
from megatron_k2.optimizer.config import MuonClipConfig
from megatron_k2.optimizer.matrices import kimi_rules
from megatron_k2.optimizer.table import announce


class Core(MaxLogitRecord, torch.nn.Module):
    records_max_logits = True


class Chunk(torch.nn.Module):
    """What the checks look at: a wrapped model of one attention layer."""

    def __init__(self, core: torch.nn.Module, ddp: dict[str, Any], config: dict[str, Any]) -> None:
        super().__init__()
        self.attention = torch.nn.Linear(2, 2)
        self.attention.core_attention = core
        self.ddp_config = DistributedDataParallelConfig(
            **{"use_distributed_optimizer": True, **ddp}
        )
        plain = dict(multi_latent_attention=True, qk_layernorm=True, qk_l2_norm=False)
        self.config = SimpleNamespace(**plain | config)


@pytest.mark.parametrize(
    ("message", "fields", "ddp", "model"),
    [
        ("without --use-distributed-opt", {}, {"use_distributed_optimizer": False}, {}),
        ("--num-distributed", {}, {"num_distributed_optimizer_instances": 2}, {}),
        ("--muon-scalar-optimizer other than adam", {"muon_scalar_optimizer": "lion"}, {}, {}),
        ("--k2-optimizer-offload all without --bf16", {"k2_optimizer_offload": "all"}, {}, {}),
        ("--k2-muon-backend triton without a GPU", {"k2_muon_backend": "triton"}, {}, {}),
        ("--k2-log-optimizer-interval below 0", {"k2_log_optimizer_interval": -1}, {}, {}),
        ("--qk-clip-alpha 1.0 must lie", {"qk_clip_alpha": 1.0}, {}, {}),
        ("matrices of --attention-output-gate", {}, {}, {"attention_output_gate": True}),
        ("matrices of --moe-mlp-glu", {}, {}, {"moe_mlp_glu_interleave_size": 32}),
        ("--qk-layernorm .*--no-k2-qk-clip", {}, {}, {"multi_latent_attention": False}),
    ],
)  # fmt: skip
def test_what_would_not_do_as_asked_is_refused_by_flag(
    monkeypatch: pytest.MonkeyPatch, message: str, fields: Any, ddp: Any, model: Any
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refuse_unsupported(MuonClipConfig(), [Chunk(Core(), {}, {})])
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(MuonClipConfig(**fields), [Chunk(Core(), ddp, model)])


def test_attention_without_a_record_is_refused_only_under_the_clip() -> None:
    chunk = Chunk(torch.nn.Linear(1, 1), {}, {})
    with pytest.raises(ValueError, match=r"attention.core_attention \(Linear\) keeps none"):
        refuse_unsupported(MuonClipConfig(), [chunk])
    refuse_unsupported(MuonClipConfig(k2_qk_clip=False), [chunk])
    silent = Core()
    silent.records_max_logits = False
    with pytest.raises(ValueError, match="--k2-max-attention-logit"):
        refuse_unsupported(MuonClipConfig(), [Chunk(silent, {}, {})])


class Group:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


def groups(**ranks: int) -> Any:
    """Process groups of tensor parallelism 2 and expert parallelism 4, as far as the table asks."""
    sizes = dict(tp=2, expt_tp=1, ep=4, pp=3, intra_dp_cp=4)
    return SimpleNamespace(**{k: Group(ranks.get(k, 0), size) for k, size in sizes.items()})


def test_the_table_shows_whole_matrices_once_a_stage(caplog: pytest.LogCaptureFixture) -> None:
    query, frozen = torch.nn.Parameter(torch.zeros(6, 4)), torch.nn.Parameter(torch.zeros(3, 3))
    query.tensor_model_parallel, query.partition_dim = True, 0  # type: ignore[attr-defined]
    frozen.requires_grad = False
    names = {query: "l.linear_q_up_proj.weight", frozen: "l.unknown"}
    caplog.set_level(logging.INFO, logger="megatron_k2.optimizer.table")
    for rank in (dict(tp=1), dict(intra_dp_cp=2), dict(pp=1)):
        announce(MuonClipConfig(), names, kimi_rules(4, 2, 4), groups(**rank))
    (text,) = caplog.messages
    assert "kimi coefficients, 5 steps in bfloat16, update 0.2 spectral" in text
    assert "QK-Clip at 100" in text and "stage 1 of 3, experts of one of 4 ranks" in text
    assert "1 of 12 x 4" in text and "unknown" not in text
