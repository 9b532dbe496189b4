"""``tools/evolve_attacks.py``: flags, and rounds of ``evolve.Evolution`` against servers."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.gym.judging import EndpointJudge, connect
from megatron_k2.gym.safety.evolve import Evolution
from megatron_k2.gym.safety.seeds import read_attacks, write_attacks
from megatron_k2.inputs import positive_int

ROLES = ("attacker", "target", "judge")


def evolve(argv: Sequence[str] | None = None) -> None:
    """Evolve attacks; the same command goes on where it was stopped.

    Raises:
        ValueError: bad input; the message names the flag.
        RuntimeError: a server answers nobody.
    """
    args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    asyncio.run(_evolve(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "evolve_attacks.py",
        description="Varies prompts that must be declined and keeps those that get through; "
        "--output/pool.jsonl is a --options file of the environment safety.",
    )
    made.add_argument("--url", required=True, help="OpenAI-compatible server, with /v1")
    for role in ROLES:
        made.add_argument(f"--{role}-model", required=True, help=f"name of the {role}")
        made.add_argument(f"--{role}-url", default="", help="its server, if another")
    made.add_argument("--api-key-env", default="", help="variable that holds the key")
    made.add_argument("--rounds", type=positive_int, default=16, help="in all (16)")
    made.add_argument("--per-round", type=positive_int, default=16, help="attempts (16)")
    made.add_argument("--seed", type=int, default=0, help="of parents and strategies (0)")
    made.add_argument("--seeds", type=Path, help="JSONL: prompt, category or own_rubric; not ours")
    made.add_argument("--output", type=Path, required=True, help="a folder")
    return made


async def _evolve(args: argparse.Namespace) -> None:
    models: list[EndpointJudge] = [
        connect(
            getattr(args, f"{role}_url") or args.url,
            getattr(args, f"{role}_model"),
            args.api_key_env,
            flags=(
                "--api-key-env",
                f"--{role}-model",
                f"--{role}-url" if getattr(args, f"{role}_url") else "--url",
            ),
        )
        for role in ROLES
    ]
    attacker, target, judge = models
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        seeds = read_attacks(args.seeds) if args.seeds else None
        journal = args.output / "attempts.journal"
        loop = Evolution(attacker, target, judge, journal, args.seed, args.per_round, seeds)
        try:
            while loop.rounds < args.rounds:
                await loop.round()
                said = ", ".join(f"{count} {what}" for what, count in sorted(loop.outcomes.items()))
                print(f"round {loop.rounds}: {len(loop.pool)} in the pool; {said}", flush=True)
            write_attacks(args.output / "pool.jsonl", loop.pool)
        finally:
            loop.close()
    finally:
        for model in models:
            await model.close()
