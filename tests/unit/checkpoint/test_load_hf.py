"""``--k2-load-hf`` in one process: every weight is the released one, or one line says why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.load_hf import LoadHF
from tests.distributed.test_conversion import global_tensors, plain
from tests.unit.checkpoint.hf_models import BASE, FP8, quantised, tensors_of, write_folder
from tests.unit.checkpoint.megatron_side import SMALL
from tests.unit.checkpoint.test_int4_groups import wrapped_folder

pytestmark = pytest.mark.usefixtures("single_process")


def model_of(config: dict[str, Any], dtype: torch.dtype, vocab_size: int = 0) -> Any:
    from megatron_k2.model.config import config_from_arguments
    from tests.unit.model.tiny import build_model

    transformer = config_from_arguments(
        arguments_from_config(config) | {"mtp_num_layers": None}, params_dtype=dtype,
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    model = build_model(transformer, vocab_size or config["vocab_size"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def assert_released(model: Any, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Every tensor that the model would save is the released one."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    expected = global_tensors(config, weights)
    described = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    apply_factories(described)
    seen: dict[str, int] = {}
    for part in nested_values(described):
        if isinstance(part, ShardedTensor):
            whole = expected[part.key].float()
            found = part.data.float().view((1,) * (whole.ndim - part.data.ndim) + part.data.shape)
            ends = zip(part.global_offset, found.shape, strict=True)
            place = whole[tuple(slice(at, at + size) for at, size in ends)]
            rows = place.shape[0]
            assert torch.equal(found[:rows], place), part.key
            assert not found[rows:].any(), part.key  # what pads a vocabulary
            seen[part.key] = seen.get(part.key, 0) + place.numel()
    assert seen == {key: t.numel() for key, t in expected.items() if not key.startswith("mtp.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "plain", "int4"])
def test_every_weight_is_the_released_one(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    if kind == "int4":
        folder, config, weights = wrapped_folder(tmp_path / "hf")
    else:
        config = BASE | SMALL | dict(num_nextn_predict_layers=1)
        stored = tensors_of(config)
        if kind == "fp8":
            config, stored = config | {"quantization_config": FP8}, quantised(stored)
        folder, weights = write_folder(tmp_path / "hf", config, stored), plain(stored)
    model = model_of(config, dtype)
    assert LoadHF(folder)([model]) == [model]
    assert_released(model, config, weights)


def test_padded_vocabulary_is_zero_beyond_the_released_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BASE | SMALL
    weights = tensors_of(config)
    folder = write_folder(tmp_path / "hf", config, weights)
    model = model_of(config, torch.float32, vocab_size=128)
    LoadHF(folder)([model])
    assert_released(model, config, weights)
    assert f"megatron_k2: loaded {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        (dict(num_hidden_layers=1), 0, "2 layers are there, 1 in the model"),
        (dict(num_hidden_layers=3), 0, "2 layers are there, 3 in the model"),
        (dict(hidden_size=80), 0, r"is \(101, 64\) there, \(101, 80\) in the model"),
        (dict(n_routed_experts=6), 0, r"is \(4, 64\) there, \(6, 64\) in the model"),
        (dict(q_lora_rank=None), 0, "has nothing for decoder.layers.0.self_attention.linear_q_p"),
        (dict(n_shared_experts=2), 0, r"shared_experts.linear_fc1.weight is \(80, 64\) there"),
        ({}, 100, r"word_embeddings.weight is \(101, 64\) there, \(100, 64\) in the model"),
    ],
)
def test_folder_of_another_model_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], vocab_size: int, message: str
) -> None:
    config = BASE | SMALL
    folder = write_folder(tmp_path / "hf", config, tensors_of(config))
    model = model_of(config | changes, torch.float32, vocab_size)
    with pytest.raises(ConversionRefused, match=message):
        LoadHF(folder)([model])


def parse(monkeypatch: pytest.MonkeyPatch, *argv: str) -> Any:
    """Parse a command line as the training script does."""
    from megatron.training.arguments import parse_args

    base = ["--micro-batch-size=1", "--mock-data", "--tokenizer-type=NullTokenizer"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *base, *argv])
    return parse_args()


def test_folder_gives_the_arguments_and_explicit_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BASE | SMALL | dict(rope_theta=10000)
    folder = write_folder(tmp_path / "hf", config, tensors_of(config))
    args = parse(monkeypatch, f"--k2-load-hf={folder}", "--moe-aux-loss-coeff=0.5")
    for dest, value in arguments_from_config(config).items():
        if dest not in ("padded_vocab_size", "mtp_num_layers", "moe_aux_loss_coeff"):
            assert getattr(args, dest, value) == value, dest
    assert args.moe_aux_loss_coeff in (0.5, [0.5])
    assert args.spec == ["megatron_k2.model.specs", "get_k2_decoder_block_spec"]


def test_folder_that_is_no_model_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_k2.inputs import UsageError

    cases = {
        "missing": (None, "--k2-load-hf .*missing: .*config.json: not there"),
        "llama": (BASE | {"model_type": "llama"}, "model_type 'llama'; only kimi_k2"),
        "linear": (BASE | {"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear'"),
        "text": (BASE | {"hidden_size": "160"}, "hidden_size '160' is not a whole number"),
    }
    for name, (config, message) in cases.items():
        if config is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match=message) as raised:
            parse(monkeypatch, "--k2-load-hf", str(tmp_path / name))
        assert "\n" not in str(raised.value)


def test_checkpoint_in_load_wins_over_the_folder(tmp_path: Path) -> None:
    """So that the same command goes on after a stop."""
    from megatron_k2.training.starting_weights import _has_checkpoint

    assert not _has_checkpoint(None)
    assert not _has_checkpoint(str(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert _has_checkpoint(str(tmp_path))
