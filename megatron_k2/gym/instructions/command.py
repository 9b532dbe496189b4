"""``tools/augment_instructions.py``: flags, and ``augment`` with a server and a sandbox."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from megatron_k2.gym.instructions.augment import augment
from megatron_k2.gym.instructions.combining import requests
from megatron_k2.gym.instructions.rule import Instruction
from megatron_k2.gym.instructions.rules import RULES, stated
from megatron_k2.gym.judging import connect
from megatron_k2.gym.sandbox.find import KINDS, find_sandbox
from megatron_k2.inputs import positive_int


def augment_instructions(argv: Sequence[str] | None = None) -> None:
    """Write instructions that came through as an expert file.

    Raises:
        ValueError: bad input; the message names the flag.
        SandboxError: no sandbox works here.
        RuntimeError: the server answers nobody.
    """
    args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    asyncio.run(_augment(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "augment_instructions.py",
        description="Has a model propose instructions with checks in Python, and keeps those that "
        "agree with their cases; --output is a --options file of the environment instructions.",
    )
    made.add_argument("--url", required=True, help="OpenAI-compatible server, with /v1")
    made.add_argument("--model", required=True, help="the name that its server knows")
    made.add_argument("--api-key-env", default="", help="variable that holds the key")
    made.add_argument("--num-proposals", type=positive_int, default=16, help="(16)")
    made.add_argument("--seed", type=int, default=0, help="of questions and requests (0)")
    made.add_argument("--sandbox", choices=KINDS, default="auto", help="(auto)")
    made.add_argument("--sandbox-url", default="", help="of --sandbox http")
    made.add_argument("--output", type=Path, required=True, help="JSONL")
    return made


async def _augment(args: argparse.Namespace) -> None:
    rng = Random(args.seed)
    kinds = sorted(RULES.values(), key=lambda rule: rule.kind)
    examples = [stated(Instruction(rule.kind, rule.draw(rng, requests()[0]))) for rule in kinds]
    sandbox = await find_sandbox(args.sandbox, args.sandbox_url)
    flags = ("--api-key-env", "--model", "--url")
    model = connect(args.url, args.model, args.api_key_env, flags=flags)
    try:
        kept, outcomes = await augment(model, sandbox, examples, args.num_proposals, args.seed)
    finally:
        await model.close()
        await sandbox.close()
    lines = [json.dumps(one.as_task(rng.choice(requests())), ensure_ascii=False) for one in kept]
    part = args.output.with_suffix(args.output.suffix + ".part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    part.replace(args.output)
    print(", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())))
