"""``tools/build_issue_tasks.py``: flags, the journal and what is printed."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_k2.gym.issues.build import (
    Candidate,
    Settings,
    from_history,
    from_rows,
    try_candidate,
)
from megatron_k2.gym.sandbox.find import KINDS, find_sandbox
from megatron_k2.inputs import positive_int
from megatron_k2.journal import CheckedLines, JournalBusy

EPILOG = """\
examples:
  # merges of pull requests, in a clone; the issue is the text of the merge
  build_issue_tasks.py --repository clones/flask --output tasks.jsonl
  # a history of squashed pull requests, whose package lies in src
  build_issue_tasks.py --repository clones/attrs --every-commit --path src --output tasks.jsonl
  # issues and patches in SWE-bench's form, of one repository
  build_issue_tasks.py --repository clones/sympy --candidates swe.jsonl --output tasks.jsonl
  # then
  gym.py validate issues --options '{"file": "tasks.jsonl"}'

Killed or stopped, the same command goes on where it was; OUTPUT.journal holds what is done.
Tests are run with Python's unittest, in the sandbox, without network and without packages.
"""


def build(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says.

    Raises:
        ValueError: bad input; the message names the flag.
    """
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.candidates is not None:
        candidates = from_rows(args.candidates)
    else:
        candidates = list(from_history(args.repository, args.every_commit))
    candidates = candidates[: args.num_candidates]
    if not candidates:
        raise ValueError(
            f"--repository {args.repository} has no change that touches tests and other files; "
            "a history without merges needs --every-commit"
        )
    if not 0 < args.wall_s < math.inf:
        raise ValueError(f"--wall-s {args.wall_s}: must be above 0 and finite")
    settings = Settings(tuple(args.path), args.repeats, args.num_shown, args.wall_s)
    rows = asyncio.run(_all(args, candidates, settings))
    tasks = [row for row in rows if "dropped" not in row]
    part = args.output.with_name(f"{args.output.name}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tasks))
    part.replace(args.output)
    counts = Counter(row.get("dropped", "task")[:80] for row in rows)
    for reason, count in counts.most_common():
        print(f"{count:6d} {reason}")
    print(f"{len(tasks)} tasks in {args.output}")


async def _all(
    args: argparse.Namespace, candidates: list[Candidate], settings: Settings
) -> list[dict[str, Any]]:
    """Try the candidates that no earlier run tried; return all rows in their order."""
    trees = args.output.with_name(f"{args.output.stem}_trees")
    try:
        journal = CheckedLines(args.output.with_name(f"{args.output.name}.journal"))
    except JournalBusy as error:
        raise ValueError(f"--output {args.output}: another run is at it ({error})") from None
    where = [str(args.repository.resolve()), settings.__dict__]
    # What a candidate is, too: a file of them may have changed under the same names.
    keys = {one.id: json.dumps([*where, asdict(one)], sort_keys=True) for one in candidates}
    try:
        rows = [(one["key"], one["row"]) for one in journal.before]
        done = {row["id"]: row for key, row in rows if keys.get(row["id"]) == key}
        left = [one for one in candidates if one.id not in done]
        if left:
            sandbox = await find_sandbox(args.sandbox, args.sandbox_url)
            try:
                for one in tqdm(left, unit="candidate", disable=not sys.stderr.isatty()):
                    row = await try_candidate(sandbox, args.repository, one, settings, trees)
                    journal.append({"key": keys[one.id], "row": row}, to_disk=True)
                    done[one.id] = row
            finally:
                await sandbox.close()
    finally:
        journal.close()
    return [done[one.id] for one in candidates]


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "build_issue_tasks.py",
        description="Makes tasks of a git repository's history, for the environments issues and "
        "issues_agent.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--repository", type=Path, required=True, help="a clone, bare or not")
    made.add_argument("--output", type=Path, required=True, help="JSONL; trees go beside it")
    made.add_argument("--candidates", type=Path, help="JSONL in SWE-bench's form; default: history")
    made.add_argument("--every-commit", action="store_true", help="of the main line, not merges")
    made.add_argument("--num-candidates", type=positive_int, help="the first so many")
    made.add_argument("--path", action="append", default=[], help="folder to import from: src")
    made.add_argument("--repeats", type=positive_int, default=2, help="runs that must agree")
    made.add_argument("--num-shown", type=positive_int, default=4, help="files in a prompt")
    made.add_argument("--wall-s", type=float, default=120.0, help="seconds for one run of tests")
    made.add_argument("--sandbox", choices=KINDS, default="auto")
    made.add_argument("--sandbox-url", default="", help="of a sandbox server, for http")
    return made
