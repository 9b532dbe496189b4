"""``tools/critic_rows.py``: preference pairs to rows that bootstrap the critic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.rl.critic.bootstrap import preference_rows, read_preferences
from megatron_k2.rl.critic.brief import load_prompt
from megatron_k2.rl.critic.rubrics import load_rubrics

EPILOG = """\
examples:
  # {"prompt": "...", "chosen": "...", "rejected": "..."} a line; two rows a pair, one an order.
  # Without labels they teach the one rubric `preferred`: people who saw both preferred chosen.
  critic_rows.py --pairs preferences.jsonl --output critic.jsonl
  # pairs that label rubrics: "rubrics": {"clarity": "chosen", "no_initial_praise":
  # {"chosen": "pass", "rejected": "fail"}}; human.toml has rubrics of one's own
  critic_rows.py --pairs labelled.jsonl --rubrics core prescriptive human.toml --output critic.jsonl
  # then, and the fine-tuning itself
  preprocess_sft.py --input critic.jsonl --output-prefix data/critic --tokenizer-model DIR
"""


def critic_rows(argv: Sequence[str] | None = None) -> None:
    """Write the rows; the same pairs give the same bytes.

    Raises:
        ValueError: bad input; the message names flag and line.
    """
    args = parser().parse_args(argv)
    try:
        prompt = load_prompt(args.prompt)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from error
    try:
        book = load_rubrics(args.rubrics)
    except ValueError as error:
        raise ValueError(f"--rubrics: {error}") from error
    rows: list[str] = []
    labelled = 0
    for number, pair in read_preferences(args.pairs):
        try:
            rows += (
                json.dumps(row, ensure_ascii=False) for row in preference_rows(pair, prompt, book)
            )
        except ValueError as error:
            raise ValueError(f"--pairs {args.pairs}, line {number}: {error}") from error
        labelled += bool(pair.get("rubrics"))
    if not rows:
        raise ValueError(f"--pairs {args.pairs}: no pair in it")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        publish_text(args.output, "\n".join(rows) + "\n")
    except OSError as error:
        raise ValueError(f"--output {args.output}: {error.strerror}") from error
    print(
        f"[critic] {len(rows) // 2:,} pairs ({labelled:,} with labels of rubrics), {len(rows):,} "
        f"rows in both orders, prompt {prompt.id}, rubrics {book.hash}: {args.output}"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "critic_rows.py",
        description="Preference pairs to dialogues that teach a critic its first verdicts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--pairs", type=Path, required=True, help="JSONL: prompt, chosen, rejected")
    add("--output", type=Path, required=True, help="JSONL of messages")
    add(
        "--prompt",
        default="pairwise",
        help="pairwise (default), compact, label_last, or a TOML file",
    )
    add(
        "--rubrics", nargs="+", default=["core", "prescriptive"],
        help="core, prescriptive, correctness, or TOML files; those that pairs may label",
    )  # fmt: skip
    return made
