"""Fine-tuning: packed rows train like one dialogue a row, in every layout; what stays as it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_k2.data.dialogues.command import preprocess
from tests.distributed.matrix import evidence_apart
from tests.distributed.trainings import RUNNER, Training, tensors_of, zygote
from tests.unit.chat.kimi_files import write_tokenizer

SFT = {RUNNER: "megatron_k2.training.sft"}
NUM_DIALOGUES = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("kimi"))


@pytest.fixture(scope="module")
def data(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same dialogues, of very different lengths, as packed rows and as a row each."""
    folder = tmp_path_factory.mktemp("dialogues")
    rng = np.random.default_rng(5)
    with (folder / "in.jsonl").open("w") as file:
        for number in range(NUM_DIALOGUES):
            words = [
                " ".join(map(str, rng.integers(0, 99, size))) for size in (3, 2 * number, 2, 9)
            ]
            roles = ("user", "assistant") * 2
            messages = [{"role": "system", "content": "s"}]  # the default one is long
            messages += [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    common = ["--input", str(folder / "in.jsonl"), "--tokenizer-model", str(tokenizer)]
    common += ["--seq-length", "256", "--workers", "1"]
    preprocess([*common, "--output-prefix", str(folder / "packed")])
    preprocess([*common, "--output-prefix", str(folder / "single"), "--no-packing"])
    return {name: str(folder / f"{name}_train") for name in ("packed", "single")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained checkpoint, which every layout starts from."""
    folder = tmp_path_factory.mktemp("base")
    training = zygote().train(
        *("--train-iters=1", f"--save={folder}", "--save-interval=1", "--vocab-size=692"),
        "--tokenizer-type=NullTokenizer",
        world_size=1,
    )
    assert training.wait() == [0], training.output()
    return folder


def num_rows(prefix: str) -> int:
    from megatron_k2.data.packed_dialogues import PackedRows

    return len(PackedRows(prefix))


Tune = Callable[..., Training]


@pytest.fixture(scope="module")
def tune(tokenizer: Path, base: Path) -> Tune:
    """Start three steps, each over all dialogues."""
    return functools.partial(_tune, tokenizer, base)


def _tune(
    tokenizer: Path,
    base: Path,
    prefix: str,
    *more: str,
    world_size: int = 1,
    finetune: bool = True,
) -> Training:
    return zygote().train(
        *(f"--train-data-path={prefix}", f"--load={base}", *["--finetune"] * finetune),
        *("--tokenizer-type=KimiTiktokenTokenizer", f"--tokenizer-model={tokenizer}"),
        *("--vocab-size=692", "--seq-length=256", f"--global-batch-size={num_rows(prefix)}"),
        *("--train-iters=3", "--lr-warmup-iters=1", *more),
        world_size=world_size,
        environment=SFT,
    )


def curve(training: Training) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    codes = training.wait()
    assert set(codes) == {0}, training.output()
    found = [[float.fromhex(x) for x in line.split()] for line in training.losses().values()]
    assert len(found) == 3
    return found


LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size=2", "--sequence-parallel"],
    "EP2": ["--expert-model-parallel-size=2"],
    "PP2": ["--pipeline-model-parallel-size=2"],
    "CP2": ["--context-parallel-size=2"],
}


@pytest.fixture(scope="module")
def single(tune: Tune, data: dict[str, str]) -> dict[str, list[list[float]]]:
    """One process, one dialogue a row, by weighting."""
    weightings = ("token", "dialogue")
    running = {name: tune(data["single"], f"--k2-sft-weighting={name}") for name in weightings}
    return {name: curve(training) for name, training in running.items()}


def test_losses_and_gradients_of_packed_rows_are_those_of_a_row_each(
    tune: Tune, data: dict[str, str], single: dict[str, Any]
) -> None:
    assert num_rows(data["packed"]) <= NUM_DIALOGUES / 2
    for weighting, wanted in single.items():
        found = curve(tune(data["packed"], f"--k2-sft-weighting={weighting}"))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-6, atol=1e-6)
    assert abs(single["token"][0][0] - single["dialogue"][0][0]) > 1e-3


@pytest.mark.parametrize("layout", evidence_apart(LAYOUTS, ["EP2", "PP2", "CP2"]))
def test_packed_rows_train_alike_in_every_layout(
    tune: Tune, data: dict[str, str], single: dict[str, Any], layout: str
) -> None:
    weighting = "dialogue" if layout == "CP2" else "token"  # a dialogue reaches over both ranks
    flags = [*LAYOUTS[layout], f"--k2-sft-weighting={weighting}"]
    found = torch.tensor(curve(tune(data["packed"], *flags, world_size=2)))
    wanted = torch.tensor(single[weighting])
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    assert_close(found[:, 0], wanted[:, 0])  # losses
    assert_close(found[:2, 1], wanted[:2, 1])  # gradients
    # Two steps of AdamW make rounding larger where gradients are near zero: 2.6e-6 in TP2.
    assert_close(found[2, 1], wanted[2, 1], rtol=1e-5)


def test_muonclip_tunes_and_router_biases_keep_their_bits_unless_asked(
    tune: Tune, data: dict[str, str], tmp_path: Path
) -> None:
    common = [
        "--optimizer=muonclip",
        "--k2-max-attention-logit",
        "--save-interval=1",
        "--k2-router-bias-rule=sign",
    ]
    asked = {"frozen": [], "moving": ["--moe-router-bias-update-rate=0.01"]}
    running = {
        name: tune(data["packed"], *common, f"--save={tmp_path / name}", *more)
        for name, more in asked.items()
    }
    for training in running.values():
        found = curve(training)
        assert found[-1][0] < found[0][0]
    moved = {}
    for name in asked:
        steps = [tensors_of(tmp_path / name / f"iter_000000{step}") for step in (1, 3)]
        biases = [key for key in steps[0] if key.endswith("expert_bias")]
        assert biases
        moved[name] = any(not torch.equal(steps[0][key], steps[1][key]) for key in biases)
    assert moved == {"frozen": False, "moving": True}


def test_the_optimizer_is_carried_over_or_fresh_and_adapters_are_tuned(
    tune: Tune, data: dict[str, str], single: dict[str, Any], base: Path
) -> None:
    carried = tune(data["single"], "--k2-stage-start=1", "--train-iters=4", finetune=False)
    adapters = tune(data["packed"], "--k2-lora-rank=4", "--lr=1e-2")
    found, fresh = curve(carried), single["token"]
    assert sorted(carried.losses()) == [2, 3, 4]
    # The same weights and rows, so the same first step's loss; then other steps of AdamW.
    assert found[0] == pytest.approx(fresh[0], rel=1e-6)
    assert abs(found[1][0] - fresh[1][0]) > 1e-4
    tuned = curve(adapters)
    assert tuned[0][0] == pytest.approx(fresh[0][0], rel=1e-6)
    assert tuned[2][0] < tuned[0][0]


def test_rows_that_are_too_long_and_paths_that_are_not_packed_are_refused(
    tune: Tune, data: dict[str, str], tmp_path: Path
) -> None:
    short = tune(data["packed"], "--seq-length=64")
    missing = tune(data["packed"], f"--train-data-path={tmp_path / 'none'}")
    assert (
        short.wait() == [2] and "packed into rows of 256; give --seq-length 256" in short.output()
    )
    assert missing.wait() == [2], missing.output()
