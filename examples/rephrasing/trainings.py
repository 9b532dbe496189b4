"""The trainings of the experiment, by tools/sweep.py, and the probe of their checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Folders, run_tool

from megatron_k2.data.tokenize import load_tokenizer
from megatron_k2.training import stages
from megatron_k2.training.fact_probe.command import OUTPUT_MARK
from megatron_k2.training.launch import free_port, run_command
from megatron_k2.training.sweeps.command import main as sweep

PROBE_MODULE = "megatron_k2.training.fact_probe.command"
MODEL_FLAGS = (
    *("--k2-preset", "k2-micro", "--k2-device", "cpu", "--k2-precision", "fp32"),
    *("--k2-threads", "1", "--optimizer", "muonclip", "--use-distributed-optimizer"),
    *("--num-workers", "0"),
)


@dataclass(frozen=True)
class Training:
    """One length and kind of run.

    Attributes:
        stage: of the blends: base or arm.
        batch: sequences of a step.
        seq_length: tokens of each.
        steps: of a run.
        checkpoint_every: steps.
        flags: more of the trainer's.
    """

    stage: str
    batch: int
    seq_length: int
    steps: int
    checkpoint_every: int
    flags: tuple[str, ...]


def tokenizer_flags(to: Folders) -> list[str]:
    """Return the trainer's flags for the tokenizer of the experiment."""
    model = to.tokenizer.resolve()
    return [
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)),
        *("--vocab-size", str(load_tokenizer(model).get_piece_size())),
    ]


def describe(to: Folders) -> Path:
    """Write what tools/sweep.py reads of the held-out text; return where."""
    lines = to.texts("heldout").read_text(encoding="utf-8").splitlines()
    heldout = {
        "prefix": f"{to.tokens('heldout').resolve()}_text_document",
        "tokens": to.num_tokens("heldout"),
        "bytes": sum(len(json.loads(line)["text"].encode()) for line in lines),
    }
    description = {
        "train": [],  # each run names its own
        "tokenizer_flags": tokenizer_flags(to),
        "domains": {"strangers": heldout},
    }
    path = to.output / "data.json"
    if stages.read_json(path) != description:
        stages.write_json(path, description)
    return path


def train(to: Folders, run: Training, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Train every arm from every seed; what was finished is skipped.

    Args:
        to: the folders.
        run: how.
        arms: whose blends are read.
        seeds: of the order of the text, and of initial weights.
    """
    axis = []
    for arm in arms:
        pairs = (to.blend(arm) / f"{run.stage}.data-args.txt").read_text().split()
        axis.append(f"{to.blend(arm).name}=--train-data-path {' '.join(pairs)}")
    run_tool(
        "sweep.py", _sweep, "--output", to.output / run.stage, "--data", describe(to),
        "--vary", "arm", *axis, "--seeds", *seeds,
        "--checkpoint-every", run.checkpoint_every, "--train-iters", run.steps,
        "--global-batch-size", run.batch, "--micro-batch-size", run.batch,
        "--seq-length", run.seq_length, "--log-interval", 10, *MODEL_FLAGS, *run.flags,
    )  # fmt: skip


def _sweep(argv: list[str]) -> list[str]:
    status = sweep(argv)
    if status == 130:
        raise KeyboardInterrupt
    return [f"it ended with status {status}"] if status else []


def folder_of(to: Folders, run: Training, arm: str, seed: int) -> Path:
    """Return the folder of a finished run."""
    label = f"arm={to.blend(arm).name},seed={seed}-"
    last = f"iter_{run.steps:07d}"
    found = list((to.output / run.stage / "runs").glob(f"{label}*/checkpoints/{last}"))
    if len(found) != 1:
        raise RuntimeError(f"{to.output / run.stage / 'runs'}: {len(found)} runs {label}*/{last}")
    return found[0].parent.parent


def probe(
    to: Folders, folder: Path, questions: str, run: Training, last: bool = False
) -> dict[int, list[list[int]]]:
    """Ask the checkpoints of a run, once.

    Args:
        to: the folders.
        folder: of the run.
        questions: name of their file.
        run: what the run was.
        last: ask the last checkpoint only.

    Returns:
        Step -> [choice, exact], 0 or 1, of each question.
    """
    path = folder / f"{questions}.json"
    stored = stages.read_json(path)
    if stored is None:
        world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        variables = [f"{key}={value}" for key, value in world.items()]
        command = ["env", *variables, f"MASTER_PORT={free_port()}", sys.executable, "-W", "ignore"]
        command += ["-m", PROBE_MODULE, "--load", str(folder / "checkpoints")]
        command += ["--k2-questions", str(to.texts(questions)), *(["--k2-last"] if last else [])]
        command += [*tokenizer_flags(to), *MODEL_FLAGS, "--micro-batch-size", "1"]
        command += ["--seq-length", str(run.seq_length), *run.flags]
        log = folder / f"{questions}.log"
        log.unlink(missing_ok=True)
        run_command(f"the probe of {folder.name}", command, log)
        stored = {str(record["step"]): record["verdicts"] for record in _records(log)}
        if str(run.steps) not in stored:
            raise RuntimeError(f"the probe printed no verdicts of step {run.steps}; see {log}")
        stages.write_json(path, stored)
    return {int(step): verdicts for step, verdicts in stored.items()}


def _records(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text(encoding="utf-8").splitlines()
    return [
        json.loads(line.removeprefix(OUTPUT_MARK)) for line in lines if line.startswith(OUTPUT_MARK)
    ]
