"""``tools/preprocess_sft.py``: flags and what is printed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_k2.chat.template_files import list_templates
from megatron_k2.data.dialogues.encode import TOOL_CHECKS, TRUNCATIONS, Options
from megatron_k2.data.dialogues.run import run
from megatron_k2.data.dialogues.units import Job
from megatron_k2.data.preprocess import publish
from megatron_k2.data.preprocess.claim import read_prefix
from megatron_k2.data.preprocess.sources import find_sources
from megatron_k2.inputs import positive_int

EPILOG = """\
a record is {"messages": [...], "tools": [...]} in OpenAI's form, or {"conversations": [...]} in
ShareGPT's; "weight": 0 in an assistant's message leaves it out of the loss.

examples:
  # 1 % of the dialogues held out -> data/chat_train.bin/.idx, data/chat_heldout.bin/.idx
  preprocess_sft.py --input 'dialogues/*.jsonl.zst' --output-prefix data/chat \\
      --tokenizer-model Kimi-K2-Instruct --seq-length 32768 --heldout-share 0.01 --workers 8
  # train on it
  torchrun ... -m megatron_k2.training.sft --load BASE --finetune \\
      --train-data-path data/chat_train --valid-data-path data/chat_heldout --seq-length 32768 ...
  # look at one packed row, the learned text marked
  preprocess_sft.py show data/chat_train 0 --tokenizer-model Kimi-K2-Instruct
  preprocess_sft.py verify data/chat

Killed at any moment, the same command goes on, and the bytes are the same; so they are for any
--workers.
"""


def preprocess(argv: Sequence[str] | None = None) -> list[str] | None:
    """Do what the command line says; return what is wrong with a verified output.

    Raises:
        ValueError: bad input; the message names the flag.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"verify": _verify, "show": _show}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    args = parser().parse_args(arguments)
    if not 0 <= args.heldout_share < 1:
        raise ValueError(f"--heldout-share {args.heldout_share} must be from 0 to below 1")
    sources = find_sources(args.input)
    for source in sources:
        if source.format == "text":
            raise ValueError(f"--input {source.path}: dialogues are .jsonl or .parquet")
    prefix = read_prefix(args.output_prefix)
    options = Options(
        tokenizer=args.tokenizer_model,
        template=args.template,
        seq_length=args.seq_length,
        truncation=args.truncate,
        last_answer_only=args.last_answer_only,
        learn_reasoning=not args.no_reasoning_loss,
        tool_checks=args.tool_calls,
    )
    job = Job(sources, options, args.skip_bad_records)
    summary = run(
        job, prefix, args.workers, args.heldout_share, args.seed, packs=not args.no_packing
    )
    print("\n".join(report(summary, prefix)))
    return None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "preprocess_sft.py",
        description="Dialogues with tools to packed rows, loss masks and boundaries.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--input", nargs="+", required=True, help="files or globs: .jsonl, .parquet; .gz, .zst")
    add("--output-prefix", required=True, metavar="PREFIX")
    add(
        "--tokenizer-model", required=True, metavar="DIR",
        help="folder of a Kimi release, or its tiktoken.model",
    )  # fmt: skip
    add("--template", default="kimi-k2", choices=list_templates())
    add("--seq-length", type=positive_int, default=4096, help="places of a row (4096)")
    add(
        "--truncate", choices=TRUNCATIONS, default="turns",
        help="a dialogue that is too long: keep whole turns up to the last answer that fits "
        "(turns, the default), as many tokens as fit (cut), drop it, or stop with an error",
    )  # fmt: skip
    add("--no-packing", action="store_true", help="a row for each dialogue")
    add("--heldout-share", type=float, default=0.0, help="of dialogues, to PREFIX_heldout (0)")
    add("--last-answer-only", action="store_true", help="learn each dialogue's last answer alone")
    add("--no-reasoning-loss", action="store_true", help="do not learn what is thought")
    add(
        "--tool-calls", choices=TOOL_CHECKS, default="count",
        help="calls that their declarations do not allow: counted (the default), drop the "
        "dialogue, or off",
    )  # fmt: skip
    add("--skip-bad-records", action="store_true", help="count malformed records and go on")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (all cores)")
    add("--seed", type=int, default=1234, help="of the order of rows")
    return made


def report(summary: dict[str, Any], prefix: Path) -> list[str]:
    """Return what the tool prints."""
    lines = []
    for name, found in summary["sets"].items():
        share = found["learned_tokens"] / found["tokens"]
        lines.append(
            f"[{name}] {found['dialogues']:,} dialogues of {found['tokens']:,} tokens "
            f"({share:.0%} learned; median {found['median_length']:,.0f}, longest "
            f"{found['longest']:,}) in {found['rows']:,} rows, {found['filled']:.1%} full: "
            f"{prefix}_{name}"
        )
        if found["copies"]:
            lines.append(f"  {found['copies']:,} are copies of another")
    notes = summary["notes"]
    lines.append("[notes] " + ", ".join(f"{name} {count:,}" for name, count in notes.items()))
    return lines


def _verify(argv: Sequence[str]) -> list[str]:
    made = argparse.ArgumentParser("preprocess_sft.py verify")
    made.add_argument("prefix", help="what --output-prefix was")
    return publish.verify(made.parse_args(argv).prefix)


def _show(argv: Sequence[str]) -> None:
    """Print the dialogues of a row; what is learned stands between >>> and <<<."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_k2.chat.tokenizer import KimiTokenizer
    from megatron_k2.data.dialogues.rows import LEARNED

    made = argparse.ArgumentParser("preprocess_sft.py show")
    made.add_argument("prefix", help="such as data/chat_train")
    made.add_argument("row", type=int)
    made.add_argument("--tokenizer-model", required=True)
    args = made.parse_args(argv)
    if not Path(f"{args.prefix}.idx").is_file():
        raise ValueError(f"{args.prefix}.idx: not there; PREFIX ends in _train or _heldout")
    tokens, learned = IndexedDataset(args.prefix), IndexedDataset(args.prefix + LEARNED)
    bounds = tokens.document_indices
    if not 0 <= args.row < len(bounds) - 1:
        raise ValueError(f"row {args.row}: {args.prefix} has rows 0 to {len(bounds) - 2}")
    tokenizer = KimiTokenizer(args.tokenizer_model)
    for number in range(bounds[args.row], bounds[args.row + 1]):
        ids, mask = tokens[number].tolist(), learned[number]
        print(f"--- dialogue {number}: {len(ids)} tokens, {int(mask.sum())} learned")
        text, at = "", 0
        while at < len(ids):
            end = at
            while end < len(ids) and mask[end] == mask[at]:
                end += 1
            piece = tokenizer.decode(ids[at:end])
            text += f">>>{piece}<<<" if mask[at] else piece
            at = end
        print(text)
