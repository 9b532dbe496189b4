"""Rung 3: the recipe's own layout on 256 GPUs under Slurm, a few steps on random documents.

Run it in an allocation, on its first node: ``sbatch --nodes=32 --gpus-per-node=8
--ntasks-per-node=1 --exclusive --wrap '.venv/bin/python tools/gpu_check.py --rung 3'``. Flags are
those of the first stage of examples/kimi_k2_1t/recipe.toml, but for text, length and batch: 2,048
sequences, 128 microbatches a pipeline, in place of 16,384. Started through the launcher that runs
recipes (training/launchers.py). No cluster was at hand: its command line is parsed by a test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_k2 import compat
from megatron_k2.gpu_check.check import CannotRun, Check, Failed, Figure, Needs, Place
from megatron_k2.gpu_check.node import PRETRAIN, tokens_per_step
from megatron_k2.gpu_check.training_log import (
    TrainingLog,
    expected_first_loss,
    read_training,
    training_figures,
)
from megatron_k2.presets import load_preset
from megatron_k2.training.launchers import DEFAULT_PORT, slurm_launcher
from megatron_k2.training.recipes.plan import flags
from megatron_k2.training.recipes.recipe import read_recipe

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "kimi_k2_1t" / "recipe.toml"
GPUS, STEPS, BATCH = 256, 6, 2048
CHECKPOINT_BYTES = 11e12  # fp32 weights, momenta and bf16 weights of 1.03e12 parameters
_REPLACED = (
    "tokenizer_type", "tokenizer_model", "global_batch_size", "eval_interval", "eval_iters",
    "save_interval", "split", "async_save", "seq_length",
)  # fmt: skip


def command(save: Path | None = None) -> list[str]:
    """Return the training command of the recipe's first stage, made short.

    Args:
        save: folder of the checkpoint after the last step; None for none.

    Raises:
        CannotRun: there is no recipe here.
    """
    if not RECIPE.is_file():
        raise CannotRun("needs a checkout: examples/kimi_k2_1t/recipe.toml is not in the wheel")
    recipe = read_recipe(RECIPE)
    stage = recipe.stages[0]
    kept = {k: v for k, v in {**recipe.layout, **stage.arguments}.items() if k not in _REPLACED}
    vocab = load_preset(recipe.preset).value("vocab_size")
    own = {
        "k2_preset": recipe.preset,
        **kept,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": int(vocab) - 1,  # type: ignore[call-overload]  # and its end of document
        "mock_data": True,
        "split": "1,0,0",
        "eval_iters": 0,
        "train_iters": STEPS,
        "lr": stage.lr,
        "min_lr": stage.lr,
        "lr_decay_style": "constant",
        "lr_warmup_iters": 0,
        "log_throughput": True,
        "log_interval": 1,
    }
    if not compat.apex_usable():  # see goldens.NO_FUSION
        own["no_gradient_accumulation_fusion"] = True
    if save is not None:
        own |= {"save": str(save), "save_interval": STEPS}
    sizes = ["--seq-length", str(stage.seq_length), "--global-batch-size", str(BATCH)]
    return [*flags(own), *sizes]


def allocated_gpus(environment: Mapping[str, str] | None = None) -> int:
    """Return the GPUs of the Slurm allocation that this process runs in; 0 outside of one."""
    environment = os.environ if environment is None else environment
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "0"
    return int(nodes) * _processes()


def _processes() -> int:
    return read_recipe(RECIPE).processes if RECIPE.is_file() else 8


def _train(place: Place, name: str, save: Path | None = None) -> tuple[TrainingLog, list[str]]:
    arguments = command(save)
    launcher = slurm_launcher(_processes(), DEFAULT_PORT)
    log = place.output / "cluster" / f"{name}.log"
    text = place.run(PRETRAIN, [*arguments, "--k2-device", "cuda"], log, launcher=launcher)
    return read_training(text, STEPS), arguments


def check_cluster(place: Place) -> list[Figure]:
    """Train a few steps in the recipe's layout."""
    log, arguments = _train(place, "cluster")
    expected = expected_first_loss("kimi-k2")
    figures = training_figures(log, tokens_per_step(arguments), expected)
    return [*figures, Figure("most allocated", log.max_allocated_bytes / 1e9, "GB")]


def check_checkpoint(place: Place) -> list[Figure]:
    """Train and save once, the trainer waiting; seconds and bytes a second."""
    folder = place.output / "cluster" / "checkpoints"
    log, _ = _train(place, "checkpoint", folder)
    if not log.save_s:
        raise Failed("the log names no time of save-checkpoint")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return [
        Figure("save", log.save_s[-1], "s"),
        Figure("size", size / 1e12, "TB"),
        Figure("rate", size / log.save_s[-1] / 1e9, "GB/s"),
    ]


CHECKS = (
    Check(
        "cluster", 3, "the recipe's layout trains: PP16 with virtual stages, EP16, ZeRO-1",
        Needs(GPUS, ("transformer_engine",)), limit_s=3600, run=check_cluster,
    ),
    Check(
        "cluster-checkpoint", 3, "how long a checkpoint of all weights and momenta takes",
        Needs(GPUS, ("transformer_engine",), disk_bytes=CHECKPOINT_BYTES), limit_s=5400,
        run=check_checkpoint,
    ),
)  # fmt: skip
