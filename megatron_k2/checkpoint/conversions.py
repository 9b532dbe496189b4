"""The conversions by folder names: what ``tools/convert_checkpoint.py`` and the main job call."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_k2.checkpoint import intact
from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.hf import source as hf_source
from megatron_k2.checkpoint.hf.arguments import config_from_arguments, differences
from megatron_k2.checkpoint.hf.folder import CONFIG, read_json
from megatron_k2.checkpoint.hf.model import shape_from_config, text_config
from megatron_k2.checkpoint.hf.pattern import (
    BESIDE,
    RECORD,
    Pattern,
    can_be_rebuilt,
    kept_files,
    open_pattern,
)
from megatron_k2.checkpoint.hf.tokenizer_files import tokenizer_files
from megatron_k2.checkpoint.stream.run import Plan, available_bytes, partial_folder, run
from megatron_k2.checkpoint.to_hf import SHARD_BYTES, WEIGHTS, Request, plan_to_hf
from megatron_k2.checkpoint.to_megatron import plan_to_megatron
from megatron_k2.checkpoint.torch_dist import folder as dist_folder
from megatron_k2.checkpoint.torch_dist import source as dist_source

DTYPES = ("source", "bf16", "fp32")
SCALES = ("original", "fresh")
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Options:
    """What a user can ask for; None leaves it to the source."""

    dtype: str = "source"  # to-megatron
    weights: str | None = None  # to-hf
    scales: str | None = None  # to-hf
    like: Path | None = None  # to-hf
    vocab_size: int | None = None  # to-hf
    tokenizer: Path | None = None  # to-hf
    shard_bytes: int = SHARD_BYTES  # to-hf


def plan(source: Path, options: Options) -> Plan:
    """Plan a conversion in the direction that the source's kind gives; no tensor is read.

    Raises:
        ConversionRefused: the source is neither, or cannot be converted as asked.
    """
    if dist_folder.is_checkpoint(source):
        return _plan_to_hf(source, options)
    if (source / CONFIG).is_file():
        return _plan_to_megatron(source, options)
    raise ConversionRefused(f"{source}: neither a Hugging Face folder nor a Megatron checkpoint")


def to_megatron(source: Path, target: Path, options: Options, workers: int, quiet: bool) -> Path:
    """Convert a Hugging Face folder into ``target/release``; return that folder.

    Raises:
        ConversionRefused: the source does not fit, or the target holds a checkpoint.
    """
    if (target / intact.TRACKER).exists():
        raise ConversionRefused(f"{target}: holds a checkpoint already; give another folder")
    release = target / intact.RELEASE
    made = _plan_to_megatron(source, options)
    if not release.exists():
        convert(made, release, workers, quiet)
    elif not _is_of(made, release):  # else only the tracker is missing: a kill came between
        raise ConversionRefused(f"{release}: is there already; remove it, or give another folder")
    intact.publish_text(target / intact.TRACKER, intact.RELEASE)
    return release


def to_hf(source: Path, target: Path, options: Options, workers: int, quiet: bool) -> Path:
    """Convert a Megatron checkpoint into a Hugging Face folder; return it.

    Raises:
        ConversionRefused: the source does not fit or is not what its manifest says, or the target
            exists.
    """
    made = _plan_to_hf(source, options)
    folder = dist_folder.resolve(source)
    problems = intact.verify_manifest_if_any(folder)
    if not (folder / BESIDE).exists():  # somebody removed it: the weights are whole without
        problems = [one for one in problems if not one.startswith(f"{folder / BESIDE}/")]
    refuse(problems, f"{source} is damaged")
    convert(made, target, workers, quiet)
    return target


def convert(made: Plan, target: Path, workers: int, quiet: bool) -> None:
    """Run a plan when the disk has room for it.

    Raises:
        ConversionRefused: it has not, or the target exists.
    """
    if target.exists():
        raise ConversionRefused(f"{target}: is there already; remove it, or give another")
    partial = partial_folder(target)
    there = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    free = available_bytes(target)
    if made.bytes_written > free + there:
        raise ConversionRefused(
            f"{target}: {made.bytes_written / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )
    run(made, target, workers, progress=not quiet)


def _is_of(made: Plan, folder: Path) -> bool:
    """Tell whether a whole folder is the output of a plan, by its manifest and its sizes."""
    if intact.made_by(folder) != made.options or intact.verify_manifest(folder, "size"):
        return False
    paths = ((folder / name, num_bytes) for name, num_bytes in made.files.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def default_workers() -> int:
    """Return one worker a core this process may use, at most 16: a disk is slower than that."""
    return min(16, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Stop the garbage collector: a plan is a million objects without a cycle, walked in vain."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_collector_off()
def _plan_to_megatron(source: Path, options: Options) -> Plan:
    return plan_to_megatron(hf_source.open_source(source), options.dtype)


@_collector_off()
def _plan_to_hf(source: Path, options: Options) -> Plan:
    folder = dist_folder.open_folder(source)
    beside = folder.path / BESIDE
    like = _pattern_folder(options.like)
    untouched = like is None and (beside / RECORD).is_file()
    pattern: Pattern | None = None
    small: tuple[Path, ...] = ()
    if like is not None or (untouched and can_be_rebuilt(beside)):
        pattern = open_pattern(like or beside)
        config, small = dict(pattern.config), pattern.small_files
        _require_same_model(folder, pattern, options)
    elif untouched:  # of a release whose shards cannot be rebuilt
        config = dict(text_config(read_json(beside / CONFIG)))
        config.pop("quantization_config", None)
        small = tuple(path for path in kept_files(beside) if path.name != CONFIG)
    else:
        config = config_from_arguments(folder.arguments, options.vocab_size)
    tokenizer = options.tokenizer or (None if small else _tokenizer_of(folder))
    extra, ids = tokenizer_files(tokenizer) if tokenizer is not None else ({}, {})
    if pattern is None and ids:
        config |= ids
        extra.setdefault(GENERATION, (json.dumps(ids, indent=2) + "\n").encode())
    had_fp8 = pattern is not None and pattern.has_fp8
    weights, original = _stored_as(options, had_fp8, untouched)
    shape = shape_from_config(config)
    if not any(key.startswith("mtp.") for key in folder.tensors):
        shape = replace(shape, mtp_num_layers=0)  # trained without the prediction layers
    checked = dist_source.open_source(folder, shape)
    request = Request(
        weights=weights,
        original_scales=original,
        pattern=pattern,
        config=config,
        small_files=small,
        extra_files=extra,
        as_released=untouched and options.weights is None and _holds_all(checked, pattern),
        mtp_num_layers=shape.mtp_num_layers,
        shard_bytes=options.shard_bytes,
    )
    made = plan_to_hf(checked, request)
    asked = {
        "weights": options.weights,
        "scales": options.scales,
        "like": str(like.resolve()) if like is not None else None,
        "vocab_size": options.vocab_size,
        "tokenizer": str(tokenizer.resolve()) if tokenizer is not None else None,
        "shard_bytes": options.shard_bytes,
    }
    return replace(made, options=made.options | asked)


def _stored_as(options: Options, had_fp8: bool, untouched: bool) -> tuple[str, bool]:
    """Return how the weights are to be stored, and whether FP8 takes the original scales.

    Args:
        options: what was asked for.
        had_fp8: the release, or the folder to be like, is FP8.
        untouched: the checkpoint is a converted release that nobody trained.

    Raises:
        ConversionRefused: no such weights, or original scales where there are none.
    """
    weights = options.weights or ("fp8" if had_fp8 and untouched else "bf16")
    if weights not in WEIGHTS:
        raise ConversionRefused(f"--weights {weights}: one of {', '.join(WEIGHTS)}")
    original = (
        options.scales or ("original" if untouched and had_fp8 and weights == "fp8" else "fresh")
    ) == "original"
    if original and (weights != "fp8" or not had_fp8):
        raise ConversionRefused("--scales original: needs --weights fp8 and a --like that is FP8")
    return weights, original


def _tokenizer_of(folder: dist_folder.TorchDistFolder) -> Path | None:
    """Return the tokenizer that a run was trained with, if its file is still there."""
    given = folder.arguments.get("tokenizer_model")
    kind = folder.arguments.get("tokenizer_type")
    known = kind in ("SentencePieceTokenizer", "KimiTiktokenTokenizer")
    return Path(given) if known and given and Path(given).exists() else None


def _pattern_folder(like: Path | None) -> Path | None:
    """Return where the pattern that a user names lies: a checkpoint's is kept beside it."""
    if like is None or (like / RECORD).is_file():
        return like
    if (like / BESIDE / RECORD).is_file():
        return like / BESIDE
    return dist_folder.resolve(like) / BESIDE if dist_folder.is_checkpoint(like) else like


def _require_same_model(
    folder: dist_folder.TorchDistFolder, pattern: Pattern, options: Options
) -> None:
    """Refuse a pattern whose config.json would make another function of the same tensors."""
    # Megatron-Core before 0.19 kept the arguments elsewhere; shapes are still compared.
    arguments = folder.arguments if dist_folder.COMMON_KEY in folder.objects else {}
    problems = differences(pattern.config, arguments)
    rows = pattern.config.get("vocab_size")
    if options.vocab_size not in (None, rows):
        problems.append(f"vocab_size: --vocab-size says {options.vocab_size}, config.json {rows}")
    refuse(problems, f"{pattern.path / CONFIG} is of another model than {folder.path}")


def _holds_all(source: dist_source.MegatronSource, pattern: Pattern | None) -> bool:
    """Tell whether no tensor of the pattern was wider than what the checkpoint holds of it."""
    return pattern is not None and not any(
        tensor.dtype == "F32" and source.dtype(tensor.name) != "F32"
        for header in pattern.headers
        for tensor in header.tensors
        if tensor.name in source.places
    )
