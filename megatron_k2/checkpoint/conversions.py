"""The conversions by folder names: what ``tools/convert_checkpoint.py`` and the main job call."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint import intact
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf import source as hf_source
from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.model import shape_from_config
from megatron_k2.checkpoint.hf.pattern import BESIDE, RECORD, open_pattern
from megatron_k2.checkpoint.stream.run import Plan, available_bytes, partial_folder, run
from megatron_k2.checkpoint.to_hf import SHARD_BYTES, WEIGHTS, Request, plan_to_hf
from megatron_k2.checkpoint.to_megatron import plan_to_megatron
from megatron_k2.checkpoint.torch_dist import folder as dist_folder
from megatron_k2.checkpoint.torch_dist import source as dist_source

DTYPES = ("source", "bf16", "fp32")
SCALES = ("original", "fresh")


@dataclass(frozen=True)
class Options:
    """What a user can ask for; None leaves it to the source."""

    dtype: str = "source"  # to-megatron
    weights: str | None = None  # to-hf
    scales: str | None = None  # to-hf
    like: Path | None = None  # to-hf
    vocab_size: int | None = None  # to-hf
    shard_bytes: int = SHARD_BYTES  # to-hf


def plan(source: Path, options: Options) -> Plan:
    """Plan a conversion in the direction that the source's kind gives; no tensor is read.

    Raises:
        ConversionRefused: the source is neither, or cannot be converted as asked.
    """
    if dist_folder.is_checkpoint(source):
        return _plan_to_hf(source, options)
    if (source / "config.json").is_file():
        return plan_to_megatron(hf_source.open_source(source), options.dtype)
    raise ConversionRefused(f"{source}: neither a Hugging Face folder nor a Megatron checkpoint")


def to_megatron(source: Path, target: Path, options: Options, workers: int, quiet: bool) -> Path:
    """Convert a Hugging Face folder into ``target/release``; return that folder.

    Raises:
        ConversionRefused: the source does not fit, or the target holds a checkpoint.
    """
    if (target / intact.TRACKER).exists():
        raise ConversionRefused(f"{target}: holds a checkpoint already; give another folder")
    release = target / intact.RELEASE
    if not release.exists():  # else only the tracker is missing: a kill came between
        made = plan_to_megatron(hf_source.open_source(source), options.dtype)
        convert(made, release, workers, quiet)
    intact.publish_text(target / intact.TRACKER, intact.RELEASE)
    return release


def to_hf(source: Path, target: Path, options: Options, workers: int, quiet: bool) -> Path:
    """Convert a Megatron checkpoint into a Hugging Face folder; return it.

    Raises:
        ConversionRefused: the source does not fit, or the target exists.
    """
    convert(_plan_to_hf(source, options), target, workers, quiet)
    return target


def convert(made: Plan, target: Path, workers: int, quiet: bool) -> None:
    """Run a plan when the disk has room for it.

    Raises:
        ConversionRefused: it has not.
    """
    partial = partial_folder(target)
    there = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    free = available_bytes(target)
    if made.bytes_written > free + there:
        raise ConversionRefused(
            f"{target}: {made.bytes_written / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )
    run(made, target, workers, progress=not quiet)


def default_workers() -> int:
    """Return one worker a core this process may use, at most 16: a disk is slower than that."""
    return min(16, len(os.sched_getaffinity(0)))


def _plan_to_hf(source: Path, options: Options) -> Plan:
    folder = dist_folder.open_folder(source)
    beside = folder.path / BESIDE
    like = options.like
    if like is not None and (like / BESIDE / RECORD).is_file():
        like = like / BESIDE
    elif like is not None and dist_folder.is_checkpoint(like):
        like = dist_folder.resolve(like) / BESIDE
    untouched = like is None and (beside / RECORD).is_file()
    shown = beside if untouched else like
    pattern = open_pattern(shown) if shown is not None else None
    config: dict[str, Any] = {}
    if pattern is None:
        config = config_from_arguments(folder.arguments, options.vocab_size)
    else:
        config = dict(pattern.config)
    had_fp8 = (config.get("quantization_config") or {}).get("quant_method") == "fp8"
    weights = options.weights or ("fp8" if had_fp8 and untouched else "bf16")
    if weights not in WEIGHTS:
        raise ConversionRefused(f"--weights {weights}: one of {', '.join(WEIGHTS)}")
    original = (
        options.scales or ("original" if untouched and had_fp8 and weights == "fp8" else "fresh")
    ) == "original"
    if original and (weights != "fp8" or not had_fp8):
        raise ConversionRefused("--scales original: needs --weights fp8 and a --like that is FP8")
    shape = shape_from_config(config)
    if not any(key.startswith("mtp.") for key in folder.tensors):
        shape = replace(shape, mtp_num_layers=0)  # trained without the prediction layers
    checked = dist_source.open_source(folder, shape)
    request = Request(weights, original, pattern, config, shape.mtp_num_layers, options.shard_bytes)
    made = plan_to_hf(checked, request)
    asked = {
        "scales": SCALES[0] if original else SCALES[1],
        "like": str(like.resolve()) if like is not None else None,
        "vocab_size": options.vocab_size,
        "shard_bytes": options.shard_bytes,
    }
    return replace(made, options=made.options | asked)
