"""Presets lie under explicit flags; what cannot work is refused in one line that names the flag."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_k2

megatron_k2.register("cpu")

from megatron_k2 import device  # noqa: E402
from megatron_k2.argument_checks import finish_k2_args, validate_k2_args  # noqa: E402
from megatron_k2.inputs import UsageError  # noqa: E402

BASE = ["--micro-batch-size", "2", "--mock-data", "--tokenizer-type", "NullTokenizer"]


def parse(monkeypatch: pytest.MonkeyPatch, *argv: str) -> argparse.Namespace:
    """Parse a command line as the stock script does, through Megatron's own function."""
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *BASE, *argv])
    return parse_args()


def validated(monkeypatch: pytest.MonkeyPatch, *argv: str) -> argparse.Namespace:
    args = parse(monkeypatch, *argv)
    validate_k2_args(args)
    return args


def test_preset_lays_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(monkeypatch, "--k2-preset", "k2-nano")
    assert (args.num_layers, args.num_experts, args.moe_router_topk) == (6, 32, 4)
    assert args.moe_layer_freq == [0, 1, 1, 1, 1, 1]
    assert args.beta_fast == 1.0
    assert args.spec == ["megatron_k2.model.specs", "get_k2_decoder_block_spec"]


def test_explicit_flag_wins_over_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(monkeypatch, "--k2-preset", "k2-nano", "--hidden-size", "128")
    assert args.hidden_size == 128
    assert args.num_experts == 32


def test_without_a_preset_the_model_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(monkeypatch, "--num-layers", "2", "--hidden-size", "64")
    assert args.spec is None
    assert args.num_experts is None


def test_host_gets_gloo_local_modules_and_its_number_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    args = validated(monkeypatch, "--k2-preset", "k2-micro")
    assert args.distributed_backend == "gloo"
    assert args.transformer_impl == "local"
    assert args.bf16 == device.host_has_fast_bf16()
    assert not validated(monkeypatch, "--k2-preset", "k2-micro", "--k2-precision", "fp32").bf16
    assert validated(monkeypatch, "--k2-preset", "k2-micro", "--bf16").bf16


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--k2-preset", "k2-nana"], r"--k2-preset 'k2-nana' is unknown; known are .*k2-nano"),
        (
            ["--k2-preset", "k2-nano", "--num-layers", "4"],
            r"--num-layers 4 contradicts --moe-layer-freq of 6 layers from --k2-preset k2-nano",
        ),
        (
            ["--k2-preset", "k2-nano", "--expert-model-parallel-size", "5"],
            r"--expert-model-parallel-size 5 must divide .*32",
        ),
        (
            ["--k2-preset", "k2-nano", "--moe-router-topk", "64"],
            r"--moe-router-topk 64 is more than --num-experts 32",
        ),
        (
            ["--k2-preset", "k2-nano", "--pipeline-model-parallel-size", "4"],
            r"--pipeline-model-parallel-size.*(processes|process)",
        ),
        (
            ["--k2-preset", "k2-nano", "--distributed-backend", "nccl"],
            r"--distributed-backend nccl",
        ),
        (
            ["--k2-preset", "k2-nano", "--transformer-impl", "transformer_engine"],
            r"--transformer-impl transformer_engine needs a GPU and --k2-device is cpu",
        ),
        (
            ["--k2-preset", "k2-nano", "--fp8-format", "e4m3"],
            r"--fp8-recipe delayed needs --transformer-impl transformer_engine and .*blockwise",
        ),
        (["--data-path", "no/such/corpus"], r"--data-path no/such/corpus: .*\.bin does not exist"),
    ],
)
def test_bad_input_is_refused_with_value_range_and_flag(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        validated(monkeypatch, *argv)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_absent_gpu_is_named() -> None:

    with pytest.raises(ValueError, match="--k2-device cuda: torch sees no GPU"):
        device.resolve_device("cuda")


def _dataset(folder: Path, tokens: list[int]) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "corpus")
    builder = IndexedDatasetBuilder(prefix + ".bin")
    builder.add_item(torch.tensor(tokens))
    builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 5000, r"--k2-preset k2-nano has a vocabulary of 4096, the tokenizer .* one of 5000"),
        ({"k2_explicit": ("vocab_size",)}, 5000, r"--vocab-size 4096 is smaller than .* 5000"),
        ({}, 4096, r"--train-data-path .* holds token 4099, outside the vocabulary of 4096"),
    ],
)
def test_vocabulary_that_does_not_match_is_refused(
    tmp_path: Path, changes: dict[str, object], size: int, message: str
) -> None:
    from megatron_k2.inputs import check_vocabulary

    fields = {
        "k2_preset": "k2-nano",
        "vocab_size": 4096,
        "padded_vocab_size": 4096,
        "tokenizer_type": "SentencePieceTokenizer",
        "train_data_path": [_dataset(tmp_path, [1, 4099, 3])],
        "k2_explicit": (),
    }
    args = argparse.Namespace(**(fields | changes))
    with pytest.raises(UsageError, match=message):
        check_vocabulary(args, argparse.Namespace(vocab_size=size))


def test_an_id_outside_the_vocabulary_is_met_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    from megatron_k2.inputs import check_vocabulary

    tokens = [1] * 4_000_000  # 16 MB; 8 MiB of it are read
    tokens[1_900_000:2_100_000] = [4099] * 200_000
    args = argparse.Namespace(
        k2_preset=None, vocab_size=4096, padded_vocab_size=4096, k2_explicit=(),
        tokenizer_type="NullTokenizer", data_path=[_dataset(tmp_path, tokens)],
    )  # fmt: skip
    with pytest.raises(UsageError, match="holds token 4099, outside the vocabulary"):
        check_vocabulary(args, argparse.Namespace(vocab_size=4096))


@pytest.mark.parametrize(
    ("split", "part"),
    [("969,30,1", "validation"), ("50,0,50", None), ("100,0,0", None), ("1,0,99", "training")],
)
def test_a_split_that_leaves_a_part_without_documents_is_refused(
    tmp_path: Path, split: str, part: str | None
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_k2.inputs import check_splits

    prefix = str(tmp_path / "few")
    builder = IndexedDatasetBuilder(prefix + ".bin")
    for _ in range(10):
        builder.add_document(torch.tensor([1, 2, 3]), [3])
    builder.finalize(prefix + ".idx")
    args = argparse.Namespace(data_path=["0.5", prefix], split=split)
    if part is None:
        check_splits(args)
        return
    with pytest.raises(
        UsageError, match=rf"--split {split} leaves none of the 10 documents .* for {part};"
    ):
        check_splits(args)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--num-attention-heads", "3"],
            r"`args.hidden_size % args.num_attention_heads == 0` does not hold; found "
            r"--hidden-size 256, --num-attention-heads 3",
        ),
        (["--seq-length", "999999"], "found --max-position-embeddings 4096, --seq-length 999999"),
        (["--global-batch-size", "0"], "found --global-batch-size 0"),
        (["--group-query-attention"], "found --group-query-attention True"),
    ],
)
def test_what_megatron_asserts_is_refused_with_the_flags_and_their_values(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    from megatron.training import arguments

    common = ("--k2-preset", "k2-nano", "--lr", "1e-3", "--train-iters", "1")
    args = parse(monkeypatch, *common, *argv)
    with pytest.raises(UsageError, match=message):
        arguments.validate_args(args)


def test_an_unknown_flag_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, "--k2-preset", "k2-nano", "--bogus", "1")
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "megatron_k2: error: unrecognized arguments: --bogus 1; --help lists all flags"
    ]


def test_an_older_python_is_the_error_whatever_it_lacks(tmp_path: Path) -> None:
    script = (
        "import sys; sys.version_info = (3, 11, 7); sys.modules['torch'] = None\n"
        "import megatron_k2.training.pretrain\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: megatron_k2 needs Python 3.12 or newer, this is" in done.stderr


def test_empty_dataset_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).touch()
    with pytest.raises(UsageError, match=r"--train-data-path .*corpus\.bin is empty"):
        validated(monkeypatch, "--train-data-path", str(prefix))


def test_runner_prints_one_line_and_leaves_with_status_2() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_k2.training.pretrain", *BASE]
    done = subprocess.run(
        [*command, "--k2-preset", "k2-nano", "--expert-model-parallel-size", "5"],
        capture_output=True,
        text=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"},
        timeout=120,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("megatron_k2: error: --expert-model-parallel")
    assert "Traceback" not in done.stderr


def test_asynchronous_saving_is_not_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(monkeypatch, "--k2-preset", "k2-micro", "--async-save")
    assert args.async_save and args.use_persistent_ckpt_worker
    assert args.async_strategy == "mcore"


def test_a_preset_saves_and_leaves_on_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validated(monkeypatch, "--k2-preset", "k2-micro").exit_signal_handler


def test_asynchronous_saving_takes_the_strategy_of_the_base_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = ["--k2-preset", "k2-micro", "--async-save", "--use-persistent-ckpt-worker"]
    assert validated(monkeypatch, *argv).async_strategy == "mcore"
    assert validated(monkeypatch, *argv, "--async-strategy", "nvrx").async_strategy == "nvrx"


def test_logging_our_maximum_does_not_ask_transformer_engine_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.training.arguments import core_transformer_config_from_args, validate_args

    args = parse(monkeypatch, "--k2-preset", "k2-micro", "--lr", "1e-3", "--train-iters", "1")
    validate_args(args)
    config = core_transformer_config_from_args(args)
    assert args.log_max_attention_logit and not config.log_max_attention_logit
    args.k2_te_max_attention_logit = True  # what an explicit --log-max-attention-logit sets
    assert core_transformer_config_from_args(args).log_max_attention_logit


def test_training_without_data_is_refused() -> None:
    from megatron_k2.inputs import require_data

    with pytest.raises(UsageError, match="no data: give --data-path"):
        require_data(argparse.Namespace(mock_data=False, skip_train=False))


MUONCLIP = ["--k2-preset", "k2-nano", "--optimizer", "muonclip"]


def test_muonclip_has_kimis_values_and_passes_as_adams_zero1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = validated(monkeypatch, *MUONCLIP)
    assert args.optimizer == "adam" and args.use_distributed_optimizer
    assert args.dist_ckpt_optim_fully_reshardable and not args.qk_clip and args.k2_qk_clip
    assert (args.muon_momentum, args.muon_nesterov, args.muon_num_ns_steps) == (0.95, True, None)
    assert (args.muon_coefficient_type, args.muon_extra_scale_factor) == ("kimi", 0.2)
    assert (args.weight_decay, args.adam_beta2) == (0.1, 0.95)
    args.log_max_attention_logit = None
    finish_k2_args(args)
    assert args.optimizer == "muonclip" and args.k2_log_optimizer_interval == args.log_interval


def test_upstreams_flags_win_over_kimis_values(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(
        monkeypatch, *MUONCLIP, "--muon-momentum", "0.9", "--weight-decay", "0.01",
        "--muon-num-ns-steps", "3", "--qk-clip-threshold", "30",
    )  # fmt: skip
    assert (args.muon_momentum, args.weight_decay, args.muon_num_ns_steps) == (0.9, 0.01, 3)
    assert args.qk_clip_threshold == 30


@pytest.mark.parametrize("fast", [True, False], ids=["bf16 unit", "no bf16 unit"])
def test_newton_schulz_is_bf16_where_the_host_multiplies_bf16(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(device, "host_has_fast_bf16", lambda: fast)
    assert validated(monkeypatch, *MUONCLIP).k2_muon_dtype == ("bf16" if fast else "fp32")
    asked = [*MUONCLIP, "--muon-fp32-matmul-prec", "medium"]
    assert validated(monkeypatch, *asked).k2_muon_dtype is None  # the flag decides
    assert validated(monkeypatch, *MUONCLIP, "--k2-muon-dtype", "bf16").k2_muon_dtype == "bf16"


def test_another_optimizer_keeps_upstreams_values(monkeypatch: pytest.MonkeyPatch) -> None:
    args = validated(monkeypatch, "--k2-preset", "k2-nano", "--optimizer", "adam")
    assert not args.k2_is_muonclip and args.muon_coefficient_type == "quintic"
    assert not args.use_distributed_optimizer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--muon-tp-mode", "blockwise"], "--muon-tp-mode blockwise: .*whole matrices"),
        (["--ckpt-format", "torch"], "--ckpt-format torch: muonclip saves torch_dist only"),
        (["--no-k2-max-attention-logit"], "--k2-qk-clip blind"),
        (["--k2-muon-workspace-bytes", "0"], "--k2-muon-workspace-bytes 0 must be at least 1"),
    ],
)
def test_what_muonclip_cannot_do_is_refused_by_flag(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        validated(monkeypatch, *MUONCLIP, *flags)


def test_help_of_all_flags_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Upstream's own texts hold a bare per cent sign, on which argparse fails."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert "--k2-load-hf" in parser.format_help()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    from tests.unit.checkpoint.hf_models import make_folder

    return make_folder(tmp_path / "hf", fp8=True)


def test_a_converted_checkpoint_names_its_own_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: Path
) -> None:
    from megatron_k2.checkpoint import conversions

    conversions.to_megatron(release, tmp_path / "out", conversions.Options(), 1, quiet=True)
    for folder in (release, tmp_path / "out", tmp_path / "out" / "release"):
        args = validated(monkeypatch, "--k2-preset", str(folder))
        assert (args.num_layers, args.num_experts, args.kv_lora_rank) == (3, 8, 48)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"--k2-preset .*config.json: not there"):
        parse(monkeypatch, "--k2-preset", str(tmp_path / "empty"))


def test_a_larger_vocabulary_than_the_folders_is_refused(
    monkeypatch: pytest.MonkeyPatch, release: Path
) -> None:
    validated(monkeypatch, "--k2-load-hf", str(release), "--vocab-size", "300")
    with pytest.raises(UsageError, match=r"--vocab-size 301: --k2-load-hf .* has 300 rows"):
        validated(monkeypatch, "--k2-load-hf", str(release), "--vocab-size", "301")


def test_what_a_preset_sets_for_memory_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = ("--k2-preset", "kimi-k2", "--expert-model-parallel-size", "1")
    args = validated(monkeypatch, *preset)
    assert args.recompute_granularity == "selective" and len(args.k2_fp8_activations) == 2
    assert args.k2_offloads_activations
    off = ("--no-recompute", "--no-fine-grained-activation-offloading", "--k2-fp8-activations")
    args = validated(monkeypatch, *preset, *off)
    assert args.recompute_granularity is None and not args.k2_fp8_activations
    assert not args.k2_offloads_activations


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--k2-fp8-scope", "linear"], "--k2-fp8-scope linear needs --fp8-format"),
        (["--k2-offload-folder", "/tmp"], "needs --fine-grained-activation-offloading"),
        (["--fine-grained-activation-offloading"], "needs --offload-modules: attn_norm"),
        (["--fp8-recipe", "blockwise"], "--fp8-recipe blockwise needs --fp8-format"),
        (
            ["--offload-modules", "attn_norm"],
            "--offload-modules attn_norm needs --fine-grained-activation-offloading",
        ),
        (
            ["--recompute-modules", "moe_act"],
            "--recompute-modules moe_act needs --recompute-granularity selective, found None",
        ),
    ],
)
def test_memory_flags_without_their_switch_are_refused(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        validated(monkeypatch, "--k2-preset", "k2-nano", *argv)


def test_offloading_that_moves_nothing_is_told_on_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offload = ("--fine-grained-activation-offloading", "--offload-modules", "attn_norm", "mlp_norm")
    for rank, argv, told in (
        ("0", (), True), ("1", (), False), ("0", ("--min-offloaded-tensor-size", "1024"), False),
    ):  # fmt: skip
        monkeypatch.setenv("RANK", rank)
        finish_k2_args(validated(monkeypatch, "--k2-preset", "k2-micro", *offload, *argv))
        line = (
            "megatron_k2: --offload-modules attn_norm mlp_norm: not offloaded, because their "
            "largest tensors, of 32,768, 32,768 elements, are below --min-offloaded-tensor-size "
            "1,048,576; give a smaller one\n"
        )
        assert capsys.readouterr().err == (line if told else "")


def test_fewer_layers_than_a_folders_are_refused_in_one_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.unit.checkpoint.megatron_side import make_small

    folder = str(make_small(tmp_path / "hf"))
    with pytest.raises(UsageError, match=r"--num-layers 1: --k2-load-hf .* has 2 layers; leave it"):
        validated(monkeypatch, "--k2-load-hf", folder, "--num-layers", "1")
