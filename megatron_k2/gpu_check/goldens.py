"""Rung 1: a model on the GPU against the same model on the CPU, step by step, module by module.

The golden run trains k2-micro for four steps on the CPU in fp32 and keeps its starting weights as a
checkpoint; every variant loads them, as a run that moves from one layout to another does, sees the
same tokens, and is compared (record.py, bounds.py). One variant trains two layers of K2's true
widths in Transformer Engine and in local modules, both on the GPU, the weights once more the same.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_k2.gpu_check.bounds import UNITS, Differences, bounds_of
from megatron_k2.gpu_check.check import Check, Figure, Needs, Place
from megatron_k2.gpu_check.record import Recording, load_recording
from megatron_k2.training.stages import read_json, write_json

RECORD = "megatron_k2.gpu_check.record"
MICRO = (
    *("--k2-preset", "k2-micro", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "128"),
    *("--lr", "1e-2", "--min-lr", "1e-2", "--lr-decay-style", "constant", "--train-iters", "10"),
    *("--optimizer", "muonclip", "--use-distributed-optimizer", "--eval-iters", "0"),
    # Logits up to 3.4: QK-Clip shrinks all 16 heads in the first step, then 8, 4 and 3.
    *("--init-method-std", "0.1", "--qk-clip-threshold", "1.0", "--seed", "7"),
)
WIDTHS = (
    *("--k2-preset", "kimi-k2", "--num-layers", "2", "--moe-layer-freq", "([0]*1+[1]*1)"),
    *("--num-experts", "8", "--moe-router-topk", "2", "--vocab-size", "8191"),
    *("--tokenizer-type", "NullTokenizer", "--no-recompute", "--k2-fp8-activations"),
    *("--no-fine-grained-activation-offloading", "--seq-length", "1024"),
    *("--micro-batch-size", "1", "--global-batch-size", "1", "--lr", "2e-4", "--train-iters", "10"),
    *("--lr-warmup-iters", "0", "--lr-decay-iters", "10", "--lr-wsd-decay-iters", "1"),
    *("--optimizer", "muonclip", "--use-distributed-optimizer", "--eval-iters", "0"),
    *("--init-method-std", "0.02", "--qk-clip-threshold", "1.0", "--seed", "7"),
)
"""61 layers' first two and 8 of 384 experts: 1.1 billion weights, 18 GB with their state."""

FP32 = ("--k2-precision", "fp32", "--k2-muon-dtype", "fp32")
BF16 = ("--k2-precision", "bf16", "--k2-muon-dtype", "bf16")
# Fused accumulation of weight gradients, Megatron's default, needs apex's extension in the output
# layer, whatever the other layers are (megatron-core 0.19.2, tensor_parallel/layers.py:1070).
NO_FUSION = ("--no-gradient-accumulation-fusion",)
LOCAL = ("--transformer-impl", "local", *NO_FUSION)
TE = ("--transformer-impl", "transformer_engine", *NO_FUSION)
FROM_START = ("--finetune", "--no-load-optim", "--no-load-rng")
SAVES_START = ("--save-interval", "1", "--no-save-optim", "--no-save-rng")


def fp8(recipe: str, scope: str = "experts") -> tuple[str, ...]:
    """Return the flags of FP8 products."""
    return ("--fp8-format", "e4m3", "--fp8-recipe", recipe, "--k2-fp8-scope", scope)


@dataclass(frozen=True)
class Variant:
    """A way to compute the model.

    Attributes:
        name: of the check.
        flags: beside those of the model.
        precision: key of ``bounds.LIMITS``.
        proves: what its passing says.
        capability: least compute capability.
        on_cpu: whether a CPU can run it as well.
    """

    name: str
    flags: tuple[str, ...]
    precision: str
    proves: str
    capability: tuple[int, int] = (0, 0)
    on_cpu: bool = False

    @property
    def packages(self) -> tuple[str, ...]:
        """Optional packages it needs."""
        return ("transformer_engine",) if TE[1] in self.flags else ()


# Least capabilities: transformer_engine/pytorch/quantization.py, check_*_support.
VARIANTS = (
    Variant(
        "golden-fp32", (*LOCAL, *FP32), "fp32",
        "local modules on the GPU are the CPU's: MLA, router, experts, MuonClip, QK-Clip",
        on_cpu=True,
    ),
    Variant(
        "golden-bf16", (*LOCAL, *BF16), "bf16", "the same in bf16, Newton-Schulz too", on_cpu=True
    ),
    Variant(
        "golden-fp8-emulated", (*LOCAL, *BF16, *fp8("blockwise")), "fp8",
        "FP8 experts, blockwise, by emulation", on_cpu=True,
    ),
    Variant(
        "te-bf16", (*TE, *BF16), "bf16",
        "Transformer Engine's MLA, grouped experts and norms are the local modules",
    ),
    Variant(
        "te-fp8-delayed", (*TE, *BF16, *fp8("delayed")), "fp8",
        "FP8 experts by Transformer Engine, delayed scaling", (8, 9),
    ),
    Variant(
        "te-fp8-tensorwise", (*TE, *BF16, *fp8("tensorwise")), "fp8",
        "FP8 experts by Transformer Engine, a scale a tensor", (8, 9),
    ),
    Variant(
        "te-fp8-blockwise", (*TE, *BF16, *fp8("blockwise")), "fp8",
        "FP8 experts by Transformer Engine in blocks: DeepSeek-V3's recipe", (9, 0),
    ),
    Variant(
        "te-fp8-mxfp8", (*TE, *BF16, *fp8("mxfp8")), "fp8",
        "FP8 experts by Transformer Engine, MXFP8", (10, 0),
    ),
    Variant(
        "te-fp8-linear", (*TE, *BF16, *fp8("blockwise", "linear")), "fp8 linear",
        "every projection in blockwise FP8: what K2's release holds in FP8", (9, 0),
    ),
)  # fmt: skip


def compare(golden: Recording, found: Recording) -> Differences:
    """Return how far a recording is from the golden one."""
    attention = [relative(found.attention[name], x) for name, x in golden.attention.items()]
    routes = [_differing(found.routes[name], x) for name, x in golden.routes.items()]
    factors = zip(found.clip_factors, golden.clip_factors, strict=True)
    return Differences(
        loss=_largest(found.losses, golden.losses, relatively=False),
        grad_norm=_largest(found.grad_norms, golden.grad_norms, relatively=True),
        first_attention=attention[0],
        attention=max(attention),
        first_routes=routes[0],
        routes=max(routes),
        first_logits=relative(found.max_logits[0], golden.max_logits[0]),
        clip_factor=max(float((a - b).abs().max()) for a, b in factors),
        updates=relative(_updates(found), _updates(golden)),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the Euclidean distance over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())


def _largest(found: list[float], expected: list[float], relatively: bool) -> float:
    pairs = zip(found, expected, strict=True)
    differences = [abs(a - b) / (abs(b) if relatively else 1.0) for a, b in pairs]
    return max(differences) if all(d == d for d in differences) else float("nan")


def _differing(found: Tensor, expected: Tensor) -> float:
    return float((expected & ~found).sum() / expected.sum())


def _updates(one: Recording) -> Tensor:
    """Return what the steps did to all weights but router biases, as one vector."""
    names = sorted(name for name in one.before if not name.endswith("expert_bias"))
    return torch.cat([(one.after[name] - one.before[name]).flatten() for name in names])


def figures_of(differences: Differences, precision: str) -> list[Figure]:
    """Return the differences with their bounds."""
    bounds = bounds_of(precision)
    return [
        Figure(name.replace("_", " "), value, UNITS.get(name, ""), bounds[name])
        for name, value in asdict(differences).items()
    ]


def golden(place: Place, model: tuple[str, ...], name: str, device: str) -> Path:
    """Return the file of a golden recording; make it if this machine and commit have none.

    Args:
        place: of the run.
        model: flags of the model.
        name: of the recording.
        device: that the golden run uses.
    """
    folder = place.output / name
    path, start, marker = (folder / one for one in ("golden.pt", "start", "made-by.json"))
    flags = [*model, *LOCAL, *FP32, "--k2-device", device]
    made_by = {"flags": flags, "machine": read_json(place.output / "machine.json")}
    if path.exists() and read_json(marker) == made_by:
        return path
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [str(path), *flags, *SAVES_START, "--save", str(start)]
    place.run(RECORD, arguments, folder / "golden.log", hides_gpus=device == "cpu")
    write_json(marker, made_by)
    return path


def run_variant(
    place: Place, variant: Variant, model: tuple[str, ...], name: str, device: str
) -> list[Figure]:
    """Record a variant from the golden run's start and compare."""
    reference = golden(place, model, name, device)
    path = reference.with_name(f"{variant.name}.pt")
    load = ("--load", str(reference.with_name("start")), *FROM_START)
    flags = (*model, *variant.flags, *load, "--k2-device", place.device)
    place.run(RECORD, [str(path), *flags], path.with_suffix(".log"), hides_gpus=place.on_cpu)
    differences = compare(load_recording(reference), load_recording(path))
    path.unlink()
    return figures_of(differences, variant.precision)


def _check(variant: Variant) -> Check:
    needs = Needs(
        1, variant.packages, capability=variant.capability, on_cpu=variant.on_cpu
    )  # fmt: skip
    return Check(
        variant.name, 1, variant.proves, needs, limit_s=180,
        run=lambda place: run_variant(place, variant, MICRO, "micro", "cpu"),
    )  # fmt: skip


_WIDE = Variant(
    "te-widths", (*TE, *BF16), "bf16",
    "the same at K2's widths: hidden 7168, 64 heads of 192 and 128 numbers, experts of 2048",
)  # fmt: skip
CHECKS = (
    *map(_check, VARIANTS),
    Check(
        _WIDE.name, 1, _WIDE.proves, Needs(1, _WIDE.packages, disk_bytes=10e9), limit_s=300,
        run=lambda place: run_variant(place, _WIDE, WIDTHS, "widths", place.device),
        plan=lambda place: ([*WIDTHS, *LOCAL, *FP32], 1),
    ),
)  # fmt: skip
