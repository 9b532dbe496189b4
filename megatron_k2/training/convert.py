"""``tools/convert_checkpoint.py``: Hugging Face <-> Megatron checkpoints, streaming and exact.

For every DeepSeek-V3-shaped model: Kimi K2, K2-0905, Moonlight, DeepSeek-V3. Needs no GPU, builds
no model and runs no remote code; memory is bounded by workers times the largest piece (32 MB).

examples:
  # what would happen: tensors, bytes, disk, time; every problem at once
  convert_checkpoint.py plan Kimi-K2-Instruct
  # block FP8 or BF16 -> torch_dist, loaded by any TP/PP/VPP/EP/DP layout with --load OUT
  convert_checkpoint.py to-megatron Kimi-K2-Instruct OUT
  # back: byte-identical files, FP8 with the original scales
  convert_checkpoint.py to-hf OUT Kimi-K2-again
  # a trained checkpoint, in BF16, or FP8 with fresh scales in the shards of the release
  convert_checkpoint.py to-hf checkpoints/iter_0001000 trained
  convert_checkpoint.py to-hf checkpoints trained --weights fp8 --like Kimi-K2-Instruct
  # read both sides again and compare every tensor; add a layer-by-layer run against transformers
  convert_checkpoint.py verify Kimi-K2-Instruct OUT
  convert_checkpoint.py verify Kimi-K2-Instruct OUT --hidden-states

Killed at any moment, the same command goes on and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from megatron_k2.checkpoint import conversions, intact
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionInterrupted, ConversionRefused
from megatron_k2.checkpoint.hf.small_files import opening_note
from megatron_k2.checkpoint.hf.weights import SCALE
from megatron_k2.checkpoint.stream.run import Plan, available_bytes
from megatron_k2.checkpoint.to_hf import SHARD_BYTES, WEIGHTS
from megatron_k2.checkpoint.torch_dist import folder as dist_folder
from megatron_k2.checkpoint.verify import verify

_TO_HF = ("weights", "scales", "like", "tokenizer", "vocab_size", "shard_gb")
NS_PER_WEIGHT = 1.2  # of one core, dequantising; tools/bench/convert.py measures it


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all four commands."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="say what a conversion would do; reads no tensor")
    plan.add_argument("source", type=Path, help="Hugging Face folder or Megatron checkpoint")
    plan.add_argument("--target", type=Path, default=Path("."), help="where it would be written")
    plan.add_argument("--disk-gb-per-s", type=_amount, default=1.0, help="for the time estimate")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    forth = commands.add_parser("to-megatron", help="Hugging Face -> torch_dist")
    forth.add_argument("source", type=Path, help="Hugging Face folder")
    forth.add_argument("target", type=Path, help="folder for Megatron's --load; gets release/")
    back = commands.add_parser("to-hf", help="torch_dist -> Hugging Face")
    back.add_argument("source", type=Path, help="folder of --save, or one of its iterations")
    back.add_argument("target", type=Path, help="the Hugging Face folder to write")
    check = commands.add_parser("verify", help="read both sides again and compare")
    check.add_argument("source", type=Path, help="what was converted, of either kind")
    check.add_argument("target", type=Path, help="what the conversion wrote, of the other kind")
    check.add_argument(
        "--hidden-states", action="store_true",
        help="also run both models layer by layer, one layer in memory at a time",
    )  # fmt: skip
    check.add_argument("--tokens", type=_count, default=64, help="length of the trial text")
    check.add_argument("--json", action="store_true", help="end with one JSON object")
    for command in (plan, forth):
        command.add_argument(
            "--dtype", choices=conversions.DTYPES,
            help="of Megatron's weights; default: source, FP8 and INT4 become bf16, others stay",
        )  # fmt: skip
    for command in (plan, back):
        _add_to_hf_flags(command)
    for command in (forth, back):
        command.add_argument(
            "--workers", type=_count, default=conversions.default_workers(), help="processes"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _add_to_hf_flags(command: argparse.ArgumentParser) -> None:
    """Add what can be asked of the Hugging Face side; ``_TO_HF`` has their destinations."""
    command.add_argument(
        "--weights", choices=WEIGHTS,
        help="of the Hugging Face side; default: as released if nobody trained them, else bf16",
    )  # fmt: skip
    command.add_argument(
        "--scales", choices=conversions.SCALES,
        help="FP8 scales; default: the original ones if nobody trained the weights, else fresh",
    )  # fmt: skip
    command.add_argument(
        "--like",
        type=Path,
        help="take shards, keys, tokenizer and config.json from this folder",
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="add this folder's or file's; default: --like's, else what the run trained with",
    )
    command.add_argument("--vocab-size", type=_count, help="rows to keep of a padded vocabulary")
    command.add_argument(
        "--shard-gb", type=_amount, help=f"size of new shards; default: {SHARD_BYTES / 1e9:g}"
    )


def _count(text: str) -> int:
    """Return a whole number of at least 1."""
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: not a whole number of at least 1")


def _amount(text: str) -> float:
    """Return a finite number above 0."""
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: not a number above 0")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return {"plan": _plan, "to-megatron": _convert, "to-hf": _convert, "verify": _verify}[
            arguments.command
        ](arguments)
    except ConversionRefused as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2
    except (ConversionInterrupted, OSError) as error:  # a full disk, say
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1


def _options(arguments: argparse.Namespace) -> Options:
    given = vars(arguments)
    return Options(
        dtype=given.get("dtype") or "source",
        weights=given.get("weights"),
        scales=given.get("scales"),
        like=given.get("like"),
        vocab_size=given.get("vocab_size"),
        tokenizer=given.get("tokenizer"),
        shard_bytes=int((given.get("shard_gb") or SHARD_BYTES / 1e9) * 1e9),
    )


def _plan(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    _refuse_other_direction(arguments)
    made = conversions.plan(arguments.source, _options(arguments))
    report = summary(made, arguments.target, arguments.disk_gb_per_s)
    if arguments.json:
        print(json.dumps({"source": str(arguments.source), **report}))
        return 0
    print(f"{arguments.source}: {made.options['direction']}, every tensor taken once")
    for name, value in report.items():
        print(f"  {name.replace('_', ' '):24s} {_spoken(name, value)}")
    print(f"  planned in {time.monotonic() - began:.1f} s; nothing was read but headers")
    return 0


def _refuse_other_direction(arguments: argparse.Namespace) -> None:
    """Refuse flags of the conversion that ``plan`` does not plan for this source."""
    is_megatron = dist_folder.is_checkpoint(arguments.source)
    unused = ("dtype",) if is_megatron else _TO_HF
    given = ["--" + name.replace("_", "-") for name in unused if getattr(arguments, name)]
    if given:
        kind, other = ("Megatron checkpoint", "to-megatron") if is_megatron else (
            "Hugging Face folder", "to-hf"
        )  # fmt: skip
        raise ConversionRefused(
            f"{', '.join(given)}: of {other}, but {arguments.source} is a {kind}; leave it out"
        )


def summary(made: Plan, target: Path, disk_gb_per_s: float) -> dict[str, float]:
    """Return a plan in numbers; the time assumes that reading and writing share one disk."""
    parts = [part for unit in made.units for part in unit.parts if part.inputs]
    numbers = (part for part in parts if not part.name.endswith(SCALE))
    weights = sum(part.shape[0] * part.shape[1] for part in numbers)
    moved = made.bytes_read + made.bytes_written
    return {
        "tensors": len({part.name for part in parts}),
        "weights": weights,
        "files": len(made.files),
        "bytes_read": made.bytes_read,
        "bytes_written": made.bytes_written,
        "bytes_free": available_bytes(target),
        "disk_seconds": round(moved / disk_gb_per_s / 1e9, 1),
        "cpu_seconds": round(weights * NS_PER_WEIGHT / 1e9, 1),
    }


def _spoken(name: str, value: float) -> str:
    if name.startswith("bytes"):
        return f"{value / 1e9:,.3f} GB ({int(value):,} bytes)"
    return f"{value:,.1f} s" if name.endswith("seconds") else f"{int(value):,}"


def _convert(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    convert = conversions.to_megatron if arguments.command == "to-megatron" else conversions.to_hf
    if arguments.target.resolve() == arguments.source.resolve():
        raise ConversionRefused(f"{arguments.target}: is the source; give another folder")
    workers, quiet = arguments.workers, arguments.quiet
    written = convert(arguments.source, arguments.target, _options(arguments), workers, quiet)
    num_bytes = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    seconds = time.monotonic() - began
    print(f"{written}: {num_bytes / 1e9:.3f} GB in {seconds:.1f} s")
    note = opening_note(written) if arguments.command == "to-hf" else ""
    if note:
        print(note)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    target = arguments.target
    if dist_folder.is_checkpoint(target):
        target = dist_folder.resolve(target)
    made_by = intact.made_by(target)
    if not made_by:
        raise ConversionRefused(f"{target}: not made by this tool, or its conversion did not end")
    like, tokenizer = made_by.get("like"), made_by.get("tokenizer")
    options = Options(
        dtype=made_by.get("dtype", "source"),
        weights=made_by.get("weights"),
        scales=made_by.get("scales"),
        like=Path(like) if like else None,
        vocab_size=made_by.get("vocab_size"),
        tokenizer=Path(tokenizer) if tokenizer else None,
        shard_bytes=made_by.get("shard_bytes", 0),
    )
    is_megatron = dist_folder.is_checkpoint(arguments.target)
    if is_megatron == dist_folder.is_checkpoint(arguments.source):
        raise ConversionRefused(
            f"{arguments.target}: of the same kind as {arguments.source}; verify compares a "
            "Hugging Face folder with a Megatron checkpoint, in the order of the conversion"
        )
    problems = verify(conversions.plan(arguments.source, options), target)
    for problem in problems[:20]:
        print(f"wrong: {problem}")
    found: dict[str, object] = {"problems": len(problems)}
    if not problems:
        print(f"{target}: every byte is what {arguments.source} gives")
        if arguments.hidden_states:
            from megatron_k2.training.compare_layers import TOLERANCE, compare

            worst = compare(arguments.source, arguments.target, arguments.tokens)
            found |= {"largest_difference": worst, "within": worst <= TOLERANCE}
    if arguments.json:
        print(json.dumps(found))
    return 1 if problems or found.get("within") is False else 0


if __name__ == "__main__":
    sys.exit(main())
