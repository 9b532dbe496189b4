"""``python -m megatron_k2.training.fact_probe.command ARGS``: a run's checkpoints asked for facts.

ARGS are the run's own, with --load, so that the model is built as it was trained; all checkpoints
of the folder are asked in one process, without optimizer state. Prints one JSON line a checkpoint:
right answers and questions by attribute and person.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_k2.data.facts_corpus.wordings import Question
from megatron_k2.data.tokenize import load_tokenizer
from megatron_k2.inputs import UsageError
from megatron_k2.training.command_line import run_as_command
from megatron_k2.training.fact_probe.scores import (
    Cloze,
    encode,
    ends_of_words,
    judge,
)
from megatron_k2.training.sample import load_model

OUTPUT_MARK = "k2-facts: "  # begins a line of results


def add_probe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the probe's flags to Megatron's parser."""
    group = parser.add_argument_group("K2 fact probe")
    group.add_argument("--k2-questions", type=Path, required=True, help="JSONL of questions")
    group.add_argument("--k2-last", action="store_true", help="ask the last checkpoint only")
    return parser


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a probe.

    Raises:
        UsageError: the file is missing or a line is no question.
    """
    try:
        found = [Question(**json.loads(line)) for line in path.open(encoding="utf-8")]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--k2-questions {path}: {error}") from error
    if not found:
        raise UsageError(f"--k2-questions {path}: holds no question")
    return found


def main() -> None:
    """Parse the command line and ask every checkpoint of --load."""
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(
        add_probe_args, args_defaults={"no_load_optim": True, "no_load_rng": True}
    )
    if args.load is None:
        raise UsageError("no checkpoint: give --load DIR, the --save folder of a run")
    questions = read_questions(args.k2_questions)
    steps = sorted(int(path.name[5:]) for path in Path(args.load).glob("iter_*"))
    if not steps:
        raise UsageError(f"--load {args.load}: no checkpoint there")
    steps = steps[-1:] if args.k2_last else steps
    args.ckpt_step = steps[0]
    model = load_model(args)
    tokenizer = load_tokenizer(Path(args.tokenizer_model))
    rows = [encode(tokenizer, q.prompt, q.candidates, q.answer) for q in questions]
    ends = ends_of_words(tokenizer)
    for step in steps:
        if step != args.ckpt_step:
            _load(model, args, step)
        record = {"step": step, "verdicts": _asked(model, rows, ends)}
        print(OUTPUT_MARK + json.dumps(record), flush=True)


def _load(model: Any, args: Any, step: int) -> None:
    from megatron.training.checkpointing import load_checkpoint

    args.ckpt_step = step
    load_checkpoint([model], None, None)


def _asked(model: Any, rows: Sequence[Cloze], ends_word: torch.Tensor) -> list[list[int]]:
    """Return [choice, exact] of each question, as 0 and 1."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])[None].expand(ids.shape)
        logits: torch.Tensor = model(ids, positions, None)
        return logits

    return [[int(v.choice), int(v.exact)] for v in judge(forward, rows, ends_word)]


if __name__ == "__main__":
    sys.exit(run_as_command(main))
