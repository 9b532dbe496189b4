"""Precision and recall of the fidelity checks on the planted set, each and together.

    python -m megatron_k2.data.rephrase.planted
    python -m megatron_k2.data.rephrase.planted --embedder hf:FOLDER --checks similarity
    python -m megatron_k2.data.rephrase.planted --checks judge --judge-model NAME --judge-server URL

*Recall* is the share of unfaithful pairs that are refused, by what was changed in them;
*precision* the share of refused pairs that are unfaithful; *accepted* the share of faithful pairs
that pass; *styled* the same of whole chunks in the styles of the prompts, of which there are few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_k2.data.rephrase.client import Client, Endpoint, key_from
from megatron_k2.data.rephrase.fidelity import Fidelity
from megatron_k2.data.rephrase.flags import add_checks
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.plain_checks import Passage
from megatron_k2.data.rephrase.planted.build import PAIRS
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.run import fidelity_of

CONCURRENCY = 8  # of questions to a judge or an embedder
SPLITS = ("all", "held_out", "chosen_on")


def read_pairs(split: str = "all") -> list[dict[str, Any]]:
    """Return the pairs of a split, or all."""
    text = resources.files(__package__).joinpath(PAIRS).read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()]
    return [pair for pair in pairs if split in ("all", pair["split"])]


async def measure(pairs: Sequence[Mapping[str, Any]], fidelity: Fidelity) -> dict[str, Any]:
    """Judge pairs with every check.

    Args:
        pairs: of `read_pairs`.
        fidelity: the checks.

    Returns:
        check -> {"accepted", "styled", "precision", "recall": {kind -> share}}, "together" too.
    """
    library, gate = Library(), asyncio.Semaphore(CONCURRENCY)
    refused: dict[str, Counter[str]] = defaultdict(Counter)
    sizes = Counter(pair["kind"] for pair in pairs)

    async def judge(pair: Mapping[str, Any]) -> None:
        passage = Passage(pair["source"], pair["source"], pair["lang"], pair["lang"])
        async with gate:
            verdicts = await fidelity.judge(
                passage, pair["rewrite"], library.judge(pair["lang"]), 1, stop_early=False
            )
        failed = {verdict.check for verdict in verdicts if verdict.passed is False}
        for check in failed | ({"together"} if failed else set()):
            refused[check][pair["kind"]] += 1

    await asyncio.gather(*(judge(pair) for pair in pairs))
    return {check: _figures(refused[check], sizes) for check in (*fidelity.checks, "together")}


def _figures(refused: Counter[str], sizes: Counter[str]) -> dict[str, Any]:
    kinds = [kind for kind in sizes if kind not in ("faithful", "styled")]
    caught = sum(refused[kind] for kind in kinds)
    total = sum(sizes[kind] for kind in kinds)
    return {
        "accepted": 1 - refused["faithful"] / sizes["faithful"],
        "styled": 1 - refused["styled"] / sizes["styled"],
        "precision": caught / (caught + refused["faithful"]) if caught else None,
        "recall": {
            "all": caught / total,
            **{kind: refused[kind] / sizes[kind] for kind in kinds},
        },
    }


def table(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures as lines of text."""
    kinds = list(next(iter(figures.values()))["recall"])
    found = [
        f"{'check':<11} accepted styled precision | recall: " + " ".join(f"{k:>8}" for k in kinds)
    ]
    for check, row in figures.items():
        precision = "   -" if row["precision"] is None else f"{row['precision']:.2f}"
        shares = " ".join(f"{row['recall'][kind]:8.2f}" for kind in kinds)
        found.append(
            f"{check:<11} {row['accepted']:8.2f} {row['styled']:6.2f} {precision:>9} |"
            f"         {shares}"
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_k2.data.rephrase.planted",
        description=(__doc__ or "").split("\n\n    ")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--split", choices=SPLITS, default="held_out", help="default held_out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME")
    add_checks(parser.add_argument_group("checks"))
    args = parser.parse_args(argv)
    args.server = args.judge_server or args.embedding_server or ""
    pairs = read_pairs(args.split)

    async def run() -> dict[str, Any]:
        clients = []

        def client_of(url: str, model: str, key_env: str) -> Client:
            endpoint = Endpoint(url, model, key_from(key_env))
            clients.append(Client(endpoint, Gate(CONCURRENCY), Budget()))
            return clients[-1]

        try:
            return await measure(pairs, fidelity_of(args, client_of))
        finally:
            for client in clients:
                await client.close()

    try:
        figures = asyncio.run(run())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = Counter(pair["kind"] for pair in pairs)
    print(f"{len(pairs)} pairs ({args.split}): " + ", ".join(f"{k} {n}" for k, n in sizes.items()))
    print("\n".join(table(figures)))
    if args.json:
        args.json.write_text(json.dumps({"pairs": sizes, "checks": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
