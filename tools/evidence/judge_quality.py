"""Judge quality on planted faults: precision and recall of rules alone, of judges, and of both.

    .venv/bin/python tools/evidence/judge_quality.py --out FOLDER

Trajectories of seven kinds (six faults and correct ones, as many of each) are played by a script in
simulated worlds and judged four ways: by rules; by judges; by both; and by rules and by both with
half of the rubrics' checks taken away. The judges are SCRIPTS that read words and err on purpose,
unless --server and --model name a real one: then the figures are that model's. Writes
FOLDER/judge_quality.json, with the ids of what was missed, and prints tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_k2.agentic.judge.measure import MODES, lines, measure
from megatron_k2.agentic.model import Model
from megatron_k2.agentic.models.routed import RenamedModel
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.models.server import ServerModel
from megatron_k2.agentic.trajectories.planted import planted_set
from megatron_k2.data.rephrase.client import Client, Endpoint, key_from
from megatron_k2.data.rephrase.gate import Budget, Gate


def judge_model(args: argparse.Namespace) -> Model:
    """Return the model that judges: a script, or a server's."""
    if not args.server:
        return ScriptedModel()
    key = key_from(args.key_env) if args.key_env else ""
    endpoint = Endpoint(args.server, args.model, key, args.timeout)
    return ServerModel(Client(endpoint, Gate(args.concurrency), Budget(), max_tries=4))


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return all figures."""
    planted = await planted_set(args.number, args.seed)
    model = judge_model(args)
    judges = [RenamedModel(model, f"judge-{at}") for at in range(1, args.judges + 1)]
    try:
        whole = await measure(planted, judges, args.seed, MODES)
        half = await measure(planted, judges, args.seed, ("rules", "hybrid"), checks_left=0.5)
    finally:
        await model.close()
    who = args.model if args.server else "scripted: says nothing of a model"
    return {"judges": f"{args.judges} x {who}", "whole rubrics": whole, "half the checks": half}


def arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--number", type=int, default=350, help="trajectories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judges", type=int, default=3)
    parser.add_argument("--server", default="", help="OpenAI-compatible address with its version")
    parser.add_argument("--model", default="", help="name of the judge's model there")
    parser.add_argument("--key-env", default="", help="environment variable that holds the key")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one try")
    args = parser.parse_args()
    if bool(args.server) != bool(args.model):
        parser.error("--server and --model go together")
    return args


def main() -> None:
    """Measure and show."""
    args = arguments()
    found = asyncio.run(run(args))
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (args.out / "judge_quality.json").write_text(text, encoding="utf-8")
    for name in ("whole rubrics", "half the checks"):
        print(
            f"\n{name}, judged by {found['judges']}, {found[name]['trajectories']} trajectories\n"
        )
        print("\n".join(lines(found[name])))
    modes = found["whole rubrics"]["modes"]
    figures = {
        mode: {name: modes[mode][name]["share"] for name in ("precision", "recall")}
        for mode in modes
    }
    agreed = modes["judge"]["agreement"]
    print(json.dumps({**figures, "krippendorff_alpha": agreed["krippendorff_alpha"]}))


if __name__ == "__main__":
    main()
