"""``tools/curate_tasks.py``: flags, and what is done with them."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from megatron_k2.chat.format import ChatFormat
from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.engine.base import Engine
from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.engine.server.models import (
    FORMATS,
    is_megatron_checkpoint,
    open_format,
    open_with_transformers,
)
from megatron_k2.gym.base import Environment, Task
from megatron_k2.gym.judging import connect
from megatron_k2.gym.registry import environment
from megatron_k2.gym.sandbox.find import find_sandbox
from megatron_k2.gym.services import Services
from megatron_k2.gym.verifiers import VerifierPool
from megatron_k2.inputs import positive_int
from megatron_k2.rl.curation import report
from megatron_k2.rl.curation.coverage import thin_weights
from megatron_k2.rl.curation.difficulty import (
    GUESSED_FORMS,
    Bounds,
    form_of,
    reason_to_drop,
    with_measures,
)
from megatron_k2.rl.curation.measuring import Measuring, measure
from megatron_k2.rl.curation.report import Curated
from megatron_k2.rl.curation.task_file import read_tasks, write_tasks

EPILOG = """\
examples:
  # tasks of two environments, measured by a served SFT model (vLLM, SGLang, tools/serve.py)
  curate_tasks.py --environments mathematics reasoning --num-tasks 500 \\
      --server http://127.0.0.1:8000/v1 --tokenizer Kimi-K2-SFT --output out/curated
  # tasks of a file, measured by a checkpoint of this machine; wider bounds, no guess filter
  curate_tasks.py --tasks tasks.jsonl --model out/sft/checkpoints --low 0.05 --high 0.95 \\
      --guesses 0 --output out/curated
  # easier or harder: pass@8 of at least one half, and never more than nine in ten at once
  curate_tasks.py --tasks tasks.jsonl --model DIR --samples 16 --k 8 --low 0.5 --output out/c8

--output gets kept.jsonl (tasks for a run file's [[environments]] tasks = "..."; their metadata
say how hard they are, for the sampler), measured.jsonl (all of them, with why one was left out),
report.txt and report.png. Killed at any moment, the same command goes on.
"""
KEPT, MEASURED, JOURNAL = "kept.jsonl", "measured.jsonl", "journal.jsonl"
OpenCheckpoint = Callable[[str, argparse.Namespace], tuple[Engine, ChatFormat]]


def curate(argv: Sequence[str] | None, open_checkpoint: OpenCheckpoint | None = None) -> None:
    """Do what the command line says.

    Args:
        argv: None: the process's.
        open_checkpoint: opens a folder of Megatron's checkpoints.

    Raises:
        ValueError: bad input; the message names the flag.
        RuntimeError: the engine fails; the same command goes on.
    """
    args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    drop = () if args.drop == ["none"] else tuple(args.drop)
    bounds = Bounds(args.low, args.high, args.k, drop, args.max_guessed)
    rules = _measuring(args)
    if args.k > args.samples:
        raise ValueError(f"--k {args.k} is more than --samples {args.samples}")
    thin_weights((), args.coverage_key, args.thin_power)
    tasks = _tasks(args)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = asyncio.run(_curate(args, tasks, bounds, rules, open_checkpoint))
    _write(args, rows, bounds)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "curate_tasks.py",
        description="Measures tasks by pass@k of a model and keeps those worth training on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument_group("tasks").add_argument
    add("--environments", nargs="+", default=[], metavar="NAME", help="see tools/gym.py list")
    add("--tasks", type=Path, nargs="+", default=[], help="JSONL of tasks, instead or besides")
    add("--split", default="train", choices=("train", "test"))
    add("--num-tasks", type=positive_int, metavar="N", help="of each environment at most")
    add("--task-seed", type=int, default=0, help="of generated tasks (0)")
    add = made.add_argument_group("model").add_argument
    add("--server", metavar="URL", help="OpenAI-compatible, asked by token ids; with /v1")
    add("--served-name", default="", help="the name that the server knows, where it has several")
    add("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the server's key")
    add("--model", metavar="PATH", help="instead: Hugging Face folder, GGUF, or checkpoints")
    add("--tokenizer", default="", metavar="DIR", help="needed with --server")
    add("--chat-format", choices=FORMATS, default="auto")
    add("--max-running", type=positive_int, help="of a --model: requests at once")
    add = made.add_argument_group("measuring").add_argument
    add("--samples", type=positive_int, default=10, help="answers a task (10)")
    add("--temperature", type=float, default=1.0, help="1.0")
    add("--top-p", type=float, default=1.0)
    add("--max-tokens", type=positive_int, default=4096, help="of an answer at most (4096)")
    add("--guesses", type=int, default=8, help="tries without reasoning (8); 0: no guess filter")
    add("--guess-tokens", type=positive_int, default=64, help="of a guess at most (64)")
    add("--concurrency", type=positive_int, default=16, help="answers under way (16)")
    add("--seed", type=int, default=0)
    add = made.add_argument_group("what is kept").add_argument
    add("--low", type=float, default=0.1, help="pass@k at least (0.1)")
    add("--high", type=float, default=0.9, help="pass@k at most (0.9)")
    add("--k", type=positive_int, default=1, help="of pass@k (1)")
    add("--max-guessed", type=int, default=0, help="right guesses a kept task may have (0)")
    add(
        "--drop", nargs="+", default=list(GUESSED_FORMS), metavar="VALUE",
        help=f"tags whose tasks are left out unmeasured ({' '.join(GUESSED_FORMS)}); none: no tag",
    )  # fmt: skip
    add("--coverage-key", default="domain", help="tag that coverage is counted by (domain)")
    add(
        "--thin-power", type=float, default=0.5, help="0: tasks weigh the same, 1: domains do (0.5)"
    )
    add = made.add_argument_group("services, for environments that need them").add_argument
    add("--workers", type=positive_int, default=2, help="verifier processes (2)")
    add("--judge-url", default="", help="OpenAI-compatible, with /v1")
    add("--judge-model", default="judge", help="the name that its server knows")
    add("--judge-key-env", default="", help="variable that holds its key")
    made.add_argument("--output", type=Path, required=True, help="a folder")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def _measuring(args: argparse.Namespace) -> Measuring:
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.guesses < 0:
        raise ValueError("--temperature and --guesses are 0 or more, --top-p above 0 and up to 1")
    if bool(args.server) == bool(args.model):
        raise ValueError("give --server URL or --model PATH, one of the two")
    if args.server and not args.tokenizer:
        raise ValueError("--server needs --tokenizer DIR: the model is asked by token ids")
    return Measuring(
        args.samples, args.temperature, args.top_p, args.max_tokens, args.guesses,
        args.guess_tokens, args.seed, args.concurrency,
    )  # fmt: skip


def _tasks(args: argparse.Namespace) -> list[Task]:
    found: list[Task] = []
    for name in args.environments:
        found += environment(name).load(args.split, args.num_tasks, args.task_seed)
    for path in args.tasks:
        found += read_tasks(path)
    if not found:
        raise ValueError("no tasks: give --environments NAME ... or --tasks FILE ...")
    seen = set()
    for task in found:
        if (task.env, task.id) in seen:
            raise ValueError(
                f"task {task.env}/{task.id} is there twice, in --environments or --tasks"
            )
        seen.add((task.env, task.id))
    return found


async def _curate(
    args: argparse.Namespace,
    tasks: Sequence[Task],
    bounds: Bounds,
    rules: Measuring,
    open_checkpoint: OpenCheckpoint | None,
) -> list[Curated]:
    wanted = [task for task in tasks if form_of(task, bounds.drop) is None]
    kinds = {name: environment(name) for name in {task.env for task in wanted}}
    async with _services(args, list(kinds.values())) as services:
        for kind in kinds.values():
            kind(services)  # what is missing is said before a model is loaded
        engine, chat_format = await _engine(args, open_checkpoint)
        try:
            name = args.server or os.path.abspath(args.model)
            found = await measure(
                wanted, engine, chat_format, services, rules, args.output / JOURNAL,
                f"{name} {args.served_name}", args.quiet, kinds.__getitem__,
            )  # fmt: skip
        finally:
            await engine.close()
    known = {(task.env, task.id): one for task, one in zip(wanted, found, strict=True)}
    rows = [(task, known.get((task.env, task.id))) for task in tasks]
    reasons = [reason_to_drop(task, one, bounds) for task, one in rows]
    kept = [task for (task, _), reason in zip(rows, reasons, strict=True) if reason is None]
    weights = iter(thin_weights(kept, args.coverage_key, args.thin_power))
    return [
        Curated(task, one, reason, next(weights) if reason is None else 0.0)
        for (task, one), reason in zip(rows, reasons, strict=True)
    ]


def _write(args: argparse.Namespace, rows: Sequence[Curated], bounds: Bounds) -> None:
    folder = args.output
    kept = [row for row in rows if row.reason is None]
    write_tasks(folder / KEPT, [with_measures(r.task, r.found, r.weight) for r in kept if r.found])
    measured = (
        {
            "id": row.task.id,
            "env": row.task.env,
            "tags": list(row.task.tags),
            "reason": row.reason,
            "weight": row.weight,
            "measured": None if row.found is None else vars(row.found),
        }
        for row in rows
    )
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in measured)
    publish_text(folder / MEASURED, text)
    said = report.lines(rows, bounds, args.coverage_key)
    publish_text(folder / "report.txt", "\n".join(said) + "\n")
    report.draw(rows, bounds, args.coverage_key, folder / "report.png")
    print("\n".join([*said, f"[curate] {folder / KEPT}, {folder / 'report.png'}"]))


async def _engine(
    args: argparse.Namespace, open_checkpoint: OpenCheckpoint | None
) -> tuple[Engine, ChatFormat]:
    if args.server:
        chat_format = open_format(args.tokenizer, args.chat_format)
        key = os.environ.get(args.api_key_env, "")
        return await OpenAIEngine.connect(args.server, args.served_name, key), chat_format
    if is_megatron_checkpoint(args.model):
        if open_checkpoint is None:
            raise ValueError(f"--model {args.model}: is a folder of Megatron's checkpoints")
        return open_checkpoint(args.model, args)
    return open_with_transformers(
        args.model, args.tokenizer, args.chat_format, args.max_running or 4
    )


@asynccontextmanager
async def _services(
    args: argparse.Namespace, kinds: Sequence[type[Environment]]
) -> AsyncIterator[Services]:
    """Start what the environments need."""
    needs = {need for kind in kinds for need in kind.needs}
    pool = VerifierPool(args.workers) if "verifiers" in needs else None
    judge = None
    if args.judge_url:
        judge = connect(args.judge_url, args.judge_model, args.judge_key_env)
    try:
        sandbox = await find_sandbox() if "sandbox" in needs else None
        yield Services(pool, sandbox, judge)
    finally:
        if pool is not None:
            pool.close()
        if judge is not None:
            await judge.close()
