"""``tools/gym.py``: flags and what is printed."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_k2.gym.base import Environment, SingleTurn, Task
from megatron_k2.gym.judging import connect
from megatron_k2.gym.options import check_options
from megatron_k2.gym.registry import environment, known
from megatron_k2.gym.sandbox.base import SandboxError
from megatron_k2.gym.sandbox.find import KINDS as SANDBOXES
from megatron_k2.gym.sandbox.find import find_sandbox
from megatron_k2.gym.services import Services
from megatron_k2.gym.splits import SPLITS
from megatron_k2.gym.validate import KINDS, Report, head, validate
from megatron_k2.gym.verifiers import VerifierPool
from megatron_k2.inputs import positive_int

EPILOG = """\
examples:
  gym.py list
  gym.py show reasoning --num 2 --options '{"datasets": ["sudoku"]}'
  gym.py show mathematics --num 3 --options '{"file": "gsm8k.jsonl"}'
  # dialogues of gold answers, to fine-tune on before RL: tools/preprocess_sft.py reads them
  gym.py gold reasoning --num 2000 --options '{"datasets": ["spell_backward"]}' --output d.jsonl
  # gold answers must score 1, empty and random ones about 0; exit status 1 if one does not
  gym.py validate mathematics reasoning
  gym.py validate --all --num 50 --split test --workers 4

--options are those of the environment's load(), as in [[environments]] of a run file.
"""
_FAILURES_SHOWN = 10  # of an environment


def gym(argv: Sequence[str] | None = None) -> list[str] | None:
    """Do what the command line says; return what failed.

    Raises:
        ValueError: bad input; the message names the flag.
    """
    args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    run: Any = args.run
    if run in (_list, _show):
        _printed(run, args)
        return None
    found: list[str] | None = run(args)
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tool."""
    made = argparse.ArgumentParser(
        "gym.py",
        description="Lists, shows and validates environments, and writes their gold answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(required=True, metavar="list | show | gold | validate")
    commands.add_parser("list", help="environments that are installed").set_defaults(run=_list)
    show = commands.add_parser("show", help="tasks with their gold answers")
    show.add_argument("environment", help="a name of `list`")
    show.set_defaults(run=_show)
    gold = commands.add_parser("gold", help="tasks and gold answers as dialogues, a line each")
    gold.add_argument("environment", help="a name of `list`; tasks of one turn")
    gold.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    gold.add_argument("--system", default="", metavar="TEXT", help="system message before each")
    gold.set_defaults(run=_gold)
    check = commands.add_parser("validate", help="do gold answers score 1 and others 0?")
    check.add_argument("environments", nargs="*", help="names of `list`")
    check.add_argument("--all", action="store_true", help="every environment")
    check.add_argument("--workers", type=positive_int, default=2, help="verifier processes (2)")
    check.add_argument("--judge-url", help="of environments that need a judge")
    check.add_argument("--judge-model", default="judge", help="the name that its server knows")
    check.add_argument("--judge-key-env", default="", help="variable that holds its key")
    check.add_argument("--sandbox", choices=SANDBOXES, default="auto", help="(auto)")
    check.add_argument("--sandbox-url", help="of --sandbox http")
    check.add_argument("--quiet", action="store_true", help="no progress bar")
    check.set_defaults(run=_validate)
    for one, number in ((show, 3), (gold, None), (check, None)):
        said = f"tasks ({number or 'all of a file, or what the environment generates'})"
        one.add_argument("--num", type=positive_int, default=number, help=said)
        one.add_argument("--split", choices=SPLITS, default="train")
        one.add_argument("--seed", type=int, default=0, help="of generated tasks (0)")
        one.add_argument("--options", default="{}", help="JSON for the environment's load()")
    return made


def _printed(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Print, as far as somebody reads: ``head`` has had enough, and that is no error."""
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes


def _list(args: argparse.Namespace) -> None:
    for name in sorted(known()):
        try:
            kind = environment(name)
        except ImportError as error:
            print(f"{name:<24} not usable: {error}")
            continue
        needs = ", ".join(kind.needs) or "nothing"
        summary = (inspect.getdoc(kind) or "").partition("\n")[0]
        print(f"{name:<24} {summary} Needs {needs}; budget {kind.budget} tokens.")


def _show(args: argparse.Namespace) -> None:
    kind = environment(args.environment)
    tasks = _load(kind, args)
    # Gold answers need no service; a stand-in lets an environment be made without one.
    env = kind(Services(**{need: object() for need in kind.needs}))  # type: ignore[arg-type]
    for task in tasks:
        print(f"=== {task.id}  {' '.join(task.tags)}  budget {task.budget or kind.budget}")
        for tool in task.tools:
            print(f"[tool] {json.dumps(tool, ensure_ascii=False)}")
        for message in task.messages:
            print(f"[{message['role']}] {message['content']}")
        for answer in env.gold(task):
            calls = answer.message.get("tool_calls")
            print(f"[gold] {answer.text}" + (f" {json.dumps(calls)}" if calls else ""))


def _gold(args: argparse.Namespace) -> None:
    kind = environment(args.environment)
    if not issubclass(kind, SingleTurn):
        raise ValueError(f"{kind.name}: its tasks have several turns; gold is of single answers")
    env = kind(Services(**{need: object() for need in kind.needs}))  # type: ignore[arg-type]
    system = [{"role": "system", "content": args.system}] if args.system else []
    tasks = _load(kind, args)
    with args.output.open("w", encoding="utf-8") as file:
        for task in tasks:
            (answer,) = env.gold(task)
            said = answer.message or {"role": "assistant", "content": answer.text}
            row = {"messages": [*system, *task.messages, said], "tools": list(task.tools)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(tasks):,} dialogues: {args.output}")


def _validate(args: argparse.Namespace) -> list[str]:
    names = sorted(known()) if args.all else args.environments
    if not names or (args.all and args.environments):
        raise ValueError("name environments, or give --all")
    return asyncio.run(_validate_each([environment(name) for name in names], args))


async def _validate_each(kinds: Sequence[type[Environment]], args: argparse.Namespace) -> list[str]:
    failed = []
    async with _services(args, {need for kind in kinds for need in kind.needs}) as services:
        print(head(), flush=True)
        for kind in kinds:
            begun = time.monotonic()
            try:
                kind(services)  # refuses where a service that it needs is missing
                report = await _validate_one(kind, args, services)
            except ValueError as error:
                print(f"{kind.name:<24}{'-':>6}  not run")
                failed.append(f"{kind.name}: not validated: {error}")
                continue
            print(f"{report.line()}  {time.monotonic() - begun:.1f} s", flush=True)
            failed += report.failures[:_FAILURES_SHOWN]
    return failed


async def _validate_one(
    kind: type[Environment], args: argparse.Namespace, services: Services
) -> Report:
    tasks = _load(kind, args)
    hidden = args.quiet or not sys.stderr.isatty()
    with tqdm(total=len(tasks) * len(KINDS), desc=kind.name, disable=hidden, leave=False) as bar:
        return await validate(kind, tasks, services, done=lambda: bar.update() and None)


def _load(kind: type[Environment], args: argparse.Namespace) -> Sequence[Task]:
    try:
        options = json.loads(args.options)
        if not isinstance(options, dict):
            raise TypeError("no JSON object")
        check_options(kind.load, options)
        return kind.load(args.split, args.num, args.seed, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--options {args.options} for {kind.name}: {error}") from error


@asynccontextmanager
async def _services(args: argparse.Namespace, needs: Collection[str]) -> AsyncIterator[Services]:
    """Make what these environments need and can be had, and end it."""
    async with AsyncExitStack() as ends:
        pool = sandbox = judge = None
        if "verifiers" in needs:
            pool = VerifierPool(args.workers)
            ends.callback(pool.close)
        if "sandbox" in needs:
            try:
                sandbox = await find_sandbox(args.sandbox, args.sandbox_url or "")
                ends.push_async_callback(sandbox.close)
            except SandboxError as error:
                print(f"no sandbox: {error}", file=sys.stderr)
        if "judge" in needs and args.judge_url:
            judge = connect(args.judge_url, args.judge_model, args.judge_key_env)
            ends.push_async_callback(judge.close)
        yield Services(pool, sandbox, judge)
