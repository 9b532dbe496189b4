"""Rung 1: memory against the plan, and what a step of MuonClip costs beside AdamW's.

Both train a preset on one device (measure.py) and compare: the bytes with a dry run of the same
command (planning/), the seconds with the same command under ``--optimizer adam``. k2-300m on a GPU,
k2-micro on a CPU. Tokens go to experts at random (``--moe-router-force-load-balancing``), because a
plan takes the router to be even and an untrained one is not.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_k2.gpu_check.check import Bound, Check, Figure, Needs, Place
from megatron_k2.gpu_check.goldens import BF16, FP32, NO_FUSION

MEASURE = "megatron_k2.gpu_check.measure"
GB = 1e9
_RUN = (
    *("--tokenizer-type", "NullTokenizer", "--train-iters", "20", "--lr", "1e-4"),
    *("--eval-iters", "0", "--use-distributed-optimizer", "--moe-router-force-load-balancing"),
    *NO_FUSION,
)
_ON_GPU = (
    *("--k2-preset", "k2-300m", "--vocab-size", "32767", "--seq-length", "2048"),
    *("--micro-batch-size", "8", "--global-batch-size", "16", *BF16, *_RUN),
)
_ON_CPU = (
    *("--k2-preset", "k2-micro", "--vocab-size", "511", "--seq-length", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", *FP32, *_RUN),
)
MUONCLIP, ADAM = ("--optimizer", "muonclip"), ("--optimizer", "adam")

MEMORY = Bound(
    0.10,
    "a plan counts every tensor of the local modules, within 3 % of a run on a CPU "
    "(tests/distributed/test_plan.py); kernels of a GPU and its allocator's blocks may add some",
)
GEMM = Bound(
    0.25,
    "of the rate of a bf16 product at 4,096: two CPU cores reach 0.74 of theirs "
    "(tools/bench/muonclip.py); matrices of 768 columns leave much of a GPU idle, and a third of "
    "that figure tells a slow kernel from small ones",
    at_least=True,
)


def command(place: Place) -> tuple[str, ...]:
    """Return the training command of this device, without its optimizer."""
    return _ON_CPU if place.on_cpu else _ON_GPU


def forecast(place: Place, flags: list[str], world_size: int, name: str) -> dict[str, float]:
    """Return a dry run's bytes of rank 0 of a command.

    Args:
        place: of the run.
        flags: of ``megatron_k2.training.pretrain``.
        world_size: processes.
        name: of the file.
    """
    # What Transformer Engine keeps is its own: the modules that are planned are the local ones.
    path = place.output / "plans" / f"{name}.json"
    arguments = [str(path), "plan", place.device, str(world_size), "0", *flags]
    place.run(MEASURE, arguments, path.with_suffix(".log"), hides_gpus=True)
    return _read(path)


def measured(place: Place, flags: tuple[str, ...], name: str) -> dict[str, float]:
    """Return bytes and seconds of a command run here."""
    path = place.output / "cost" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(path), "real", *flags, "--k2-device", place.device]
    place.run(MEASURE, arguments, path.with_suffix(".log"), hides_gpus=place.on_cpu)
    return _read(path)


def _read(path: Any) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def memory_figures(planned: float, found: float) -> list[Figure]:
    """Return two sizes in bytes and how far they are apart, relative to the plan."""
    return [
        Figure("planned peak", planned / GB, "GB"),
        Figure("measured peak", found / GB, "GB"),
        Figure("difference", abs(found / planned - 1), "", MEMORY),
    ]


def check_memory(place: Place) -> list[Figure]:
    """Compare the peak of a step with its forecast."""
    flags = (*command(place), *MUONCLIP)
    planned = forecast(place, list(flags), 1, "memory")
    return memory_figures(planned["peak"], measured(place, flags, "memory")["peak"])


def check_optimizer(place: Place) -> list[Figure]:
    """Time MuonClip's step and AdamW's on the same model."""
    muon = measured(place, (*command(place), *MUONCLIP), "muonclip")
    adam = measured(place, (*command(place), *ADAM), "adam")
    rate = muon["muon_flops"] / muon["optimizer_s"]
    extra = muon["optimizer_s"] - adam["optimizer_s"]
    passes = muon["step_s"] - muon["optimizer_s"]
    return [
        Figure("MuonClip step", 1e3 * muon["optimizer_s"], "ms"),
        Figure("AdamW step", 1e3 * adam["optimizer_s"], "ms"),
        Figure("MuonClip over AdamW", muon["optimizer_s"] / adam["optimizer_s"]),
        Figure("extra, of forward and backward", extra / passes),
        Figure("Newton-Schulz", rate / 1e12, "TFLOP/s"),
        Figure(
            "of the GEMM rate", rate / muon["gemm_flops_per_s"], "", None if place.on_cpu else GEMM
        ),
    ]


CHECKS = (
    Check(
        "memory", 1, "the peak of a step is what megatron-k2 plan counts",
        Needs(on_cpu=True), limit_s=180, run=check_memory,
        plan=lambda place: ([*command(place), *MUONCLIP], 1),
    ),
    Check(
        "muonclip-cost", 1, "what a step of MuonClip costs beside AdamW's",
        Needs(on_cpu=True), limit_s=240, run=check_optimizer,
    ),
)  # fmt: skip
