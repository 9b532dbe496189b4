"""``python -m megatron_k2.life.asking``: OpenAI's own client asks a served model for a tool.

Held-out questions of synthesis, one after the other, with their tools, until an answer calls one
as its declaration allows; the last question and answer are kept. The client is the stock package.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_k2.chat.schema import ToolSchemas, check_message
from megatron_k2.compat import optional
from megatron_k2.life.dialogues import read_rows
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.stages import write_json

MAX_TOKENS = 128  # of an answer: a call has 20 to 100


def ask(args: argparse.Namespace) -> None:
    """Ask until a call is valid, and write what was asked and answered.

    Raises:
        ValueError: no file of dialogues.
        RuntimeError: the client is not installed.
    """
    try:
        optional("openai").require()
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    from openai import OpenAI

    client = OpenAI(base_url=args.server, api_key="none")
    valid = asked = 0
    shown: dict[str, Any] = {}
    for row in read_rows(args.dialogues)[: args.questions]:
        answer = client.chat.completions.create(
            model=args.model,
            messages=row["messages"][:-1],
            tools=row["tools"],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
        asked += 1
        message = answer.choices[0].message.model_dump(exclude_none=True)
        calls = check_message(message, ToolSchemas(row["tools"]))
        shown = {"question": row["messages"][-2]["content"], "answer": json.dumps(message)}
        valid = sum(not problems for problems in calls)
        print(f"[ask] {shown['question']}\n[ask] {shown['answer']}")
        if valid:
            break
    write_json(args.output, {"asked": asked, "valid_calls": valid, **shown})


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser("python -m megatron_k2.life.asking", description=__doc__)
    add = made.add_argument
    add("--server", required=True, metavar="URL", help="with /v1")
    add("--model", required=True)
    add("--dialogues", type=Path, required=True, metavar="JSONL", help="that end with a call")
    add("--questions", type=int, default=3, help="to try; default 3")
    add("--output", type=Path, required=True, metavar="JSON")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: ask(args))


if __name__ == "__main__":
    sys.exit(main())
