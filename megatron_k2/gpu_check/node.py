"""Rung 2: four layers at K2's true widths on one node, EP8 over NCCL; and a run that is resumed.

Everything is ``megatron_k2.training.pretrain`` under torchrun on random documents, as anybody would
start it. With ``--device cpu`` the same commands train k2-micro in two processes over gloo, EP2.
Experts' state of the slice (51 billion weights over 8 GPUs) is 90 GB a GPU: ``offload_for`` asks
the plan how much of it must lie in host memory. The resumed run has 48 experts, so that a
checkpoint of it takes some 100 GB and not 600.
"""

from __future__ import annotations

import json
import shutil

from megatron_k2.gpu_check.bounds import LIMITS
from megatron_k2.gpu_check.check import Bound, CannotRun, Check, Figure, Needs, Place
from megatron_k2.gpu_check.cost import forecast, memory_figures
from megatron_k2.gpu_check.goldens import BF16, FP32, TE, fp8
from megatron_k2.gpu_check.training_log import (
    TrainingLog,
    expected_first_loss,
    largest_difference,
    read_training,
    training_figures,
)
from megatron_k2.training.launchers import Launcher

PRETRAIN = "megatron_k2.training.pretrain"
STEPS = 12
RESUME_AT, RESUME_STEPS = 3, 6
ROOM = 0.92  # of a GPU's memory: the rest is CUDA's, NCCL's and fragments'

_RUN = (
    *("--tokenizer-type", "NullTokenizer", "--mock-data", "--eval-iters", "0", "--split", "1,0,0"),
    *("--optimizer", "muonclip", "--use-distributed-optimizer", "--log-interval", "1"),
    *("--lr", "2e-4", "--min-lr", "2e-4", "--lr-decay-style", "constant", "--seed", "7"),
    *("--lr-warmup-iters", "0", "--log-throughput", "--moe-router-force-load-balancing"),
    *("--train-iters", str(STEPS)),
)
_SLICE = (
    *("--k2-preset", "kimi-k2", "--num-layers", "4", "--moe-layer-freq", "([0]*1+[1]*3)"),
    *("--vocab-size", "163839", "--expert-model-parallel-size", "8", "--seq-length", "4096"),
    *("--micro-batch-size", "1", "--global-batch-size", "64", *BF16, *_RUN),
)
_SMALL = (
    *("--k2-preset", "k2-micro", "--vocab-size", "511", "--expert-model-parallel-size", "2"),
    *("--seq-length", "128", "--micro-batch-size", "2", "--global-batch-size", "8", *FP32, *_RUN),
)
_FEWER_EXPERTS = ("--num-experts", "48")

SAME_LOSS = Bound(
    LIMITS["bf16"].loss, "tokens' sums in another order, in bf16 (bounds.py: golden-bf16's loss)"
)
FP8_LOSS = Bound(LIMITS["fp8"].loss, "FP8 against bf16 (bounds.py: te-fp8's loss)")
RESUMED_LOSS = Bound(
    1e-3,
    "weights, momenta and data are the same to the bit; kernels that sum by atomic additions are "
    "not, and the printed loss has seven digits",
)


def processes(place: Place) -> int:
    """Return how many a rung-2 run has."""
    return 2 if place.on_cpu else 8


def slice_command(place: Place) -> list[str]:
    """Return the slice's flags, without those of FP8, dispatcher and offloading."""
    return [*_SMALL] if place.on_cpu else [*_SLICE]


def offload_for(place: Place, flags: list[str]) -> tuple[str, dict[str, float]]:
    """Return the least ``--k2-optimizer-offload`` whose plan fits a GPU, and that plan.

    Raises:
        CannotRun: not even all of it in host memory is enough.
    """
    for offload in ("none", "moments", "all"):
        wanted = [*flags, "--k2-optimizer-offload", offload]
        planned = forecast(place, wanted, processes(place), f"slice-{offload}")
        if place.on_cpu or planned["peak"] <= ROOM * place.gpu_memory_bytes:
            return offload, planned
    raise CannotRun(
        f"needs {planned['peak'] / ROOM / 1e9:.0f} GB a GPU by the plan, found "
        f"{place.gpu_memory_bytes / 1e9:.0f}"
    )


def _train(place: Place, name: str, flags: list[str], steps: int) -> TrainingLog:
    launcher = Launcher("torchrun", processes(place))
    text = place.run(
        PRETRAIN, [*flags, "--k2-device", place.device], place.output / "node" / f"{name}.log",
        launcher=launcher, hides_gpus=place.on_cpu,
    )  # fmt: skip
    return read_training(text, steps)


def _te(place: Place) -> tuple[str, ...]:
    return () if place.on_cpu else TE


def _first_loss(place: Place) -> float:
    return expected_first_loss("k2-micro" if place.on_cpu else "kimi-k2")


def tokens_per_step(flags: list[str]) -> int:
    """Return the tokens of a step of a command line."""
    return int(_value(flags, "--seq-length")) * int(_value(flags, "--global-batch-size"))


def _value(flags: list[str], flag: str) -> str:
    return flags[len(flags) - 1 - flags[::-1].index(flag) + 1]


def check_slice(place: Place) -> list[Figure]:
    """Train the slice in bf16; speed, loss, memory."""
    flags = slice_command(place)
    offload, planned = offload_for(place, flags)
    place.say(f"slice: --k2-optimizer-offload {offload}, plan {planned['peak'] / 1e9:.3g} GB a GPU")
    flags += ["--k2-optimizer-offload", offload]
    log = _train(place, "slice", [*flags, *_te(place)], STEPS)
    kept = {"offload": offload, "losses": log.losses}
    (place.output / "node" / "slice.json").write_text(json.dumps(kept), encoding="utf-8")
    figures = training_figures(log, tokens_per_step(flags), _first_loss(place))
    if not place.on_cpu:  # there the log has the size of the whole process
        figures += memory_figures(planned["peak"], log.max_allocated_bytes)
    return figures


def _against_slice(place: Place, name: str, extra: tuple[str, ...], bound: Bound) -> list[Figure]:
    """Train the slice with other flags; compare the losses with the first one's."""
    path = place.output / "node" / "slice.json"
    if not path.exists():
        raise CannotRun("needs the losses of the check slice; run that first")
    kept = json.loads(path.read_text(encoding="utf-8"))
    flags = [*slice_command(place), "--k2-optimizer-offload", kept["offload"], *_te(place)]
    log = _train(place, name, [*flags, *extra], STEPS)
    before = {int(step): loss for step, loss in kept["losses"].items()}
    difference = largest_difference(log.losses, before)
    return [
        Figure("loss off the slice's", difference, "nats", bound),
        *training_figures(log, tokens_per_step(flags), _first_loss(place)),
    ]


def check_fp8(place: Place) -> list[Figure]:
    """Train the slice with experts in blockwise FP8."""
    return _against_slice(place, "slice-fp8", fp8("blockwise"), FP8_LOSS)


DEEPEP = ("--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "deepep")


def check_deepep(place: Place) -> list[Figure]:
    """Train the slice with DeepEP's dispatcher in place of NCCL's all-to-all."""
    return _against_slice(place, "slice-deepep", DEEPEP, SAME_LOSS)


def check_resume(place: Place) -> list[Figure]:
    """Train, save half-way, train on from there; compare the steps that both runs made."""
    own = () if place.on_cpu else _FEWER_EXPERTS
    folder = place.output / "node" / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*slice_command(place), *own, *_te(place), "--train-iters", str(RESUME_STEPS)]
    saves = ["--save", str(folder), "--save-interval", str(RESUME_AT)]
    whole = _train(place, "resume-whole", [*flags, *saves], RESUME_STEPS)
    load = ["--load", str(folder), "--ckpt-step", str(RESUME_AT)]
    resumed = _train(place, "resume-rest", [*flags, *load], RESUME_STEPS - RESUME_AT)
    shutil.rmtree(folder, ignore_errors=True)
    difference = largest_difference(resumed.losses, whole.losses)
    saved = [Figure("save", min(whole.save_s), "s")] if whole.save_s else []
    return [Figure("loss off the unbroken run's", difference, "nats", RESUMED_LOSS), *saved]


_EIGHT = Needs(8, ("transformer_engine",), on_cpu=True)
CHECKS = (
    Check(
        "slice", 2, "4 layers at K2's widths train over NCCL, EP8, at the memory that was planned",
        _EIGHT, limit_s=1200, run=check_slice,
        plan=lambda place: (slice_command(place), processes(place)),
    ),
    Check(
        "slice-fp8", 2, "experts in blockwise FP8 train alike",
        Needs(8, ("transformer_engine",), capability=(9, 0), on_cpu=True), limit_s=900,
        run=check_fp8,
    ),
    Check(
        "slice-deepep", 2, "DeepEP's dispatcher gives what all-to-all gives",
        Needs(8, ("transformer_engine",), ("deep_ep",)), limit_s=900, run=check_deepep,
    ),
    Check(
        "resume", 2, "a run resumed from a checkpoint goes on as if it had not been broken",
        Needs(8, ("transformer_engine",), disk_bytes=400e9, on_cpu=True), limit_s=1200,
        run=check_resume,
    ),
)  # fmt: skip
