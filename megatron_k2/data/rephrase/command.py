"""What `tools/rephrase_data.py` does with its flags (`flags.py`)."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path

from megatron_k2.data.rephrase.flag_checks import PromptCheck, check_flags
from megatron_k2.data.rephrase.parts import (
    RECORDS,
    check_published,
    is_done,
    read_counts,
    run_parts,
    write_json,
)
from megatron_k2.data.rephrase.prompts import TASKS, Library
from megatron_k2.data.rephrase.ray_mode import run_on_ray
from megatron_k2.data.rephrase.report import Progress, lines, summary
from megatron_k2.data.rephrase.run import build_run, claim, identity_of
from megatron_k2.data.rephrase.sources import Part, find_inputs, plan_parts


def run(args: argparse.Namespace) -> list[str]:
    """Rewrite what the flags name; return what stopped it, a line each.

    Raises:
        ValueError: a flag or an input that cannot be used.
    """
    if args.list_prompts:
        _list_prompts(Library(args.prompts))
        return []
    check_flags(args)
    paths = find_inputs(args.input)
    skipped: Counter[str] = Counter()
    parts = plan_parts(
        paths, args.documents_per_part, args.text_field, args.limit,
        skipped if args.skip_bad_records else None, PromptCheck(args),
    )  # fmt: skip
    name = claim(args.output, identity_of(args, paths))
    check_published(args.output, parts)
    done = sum(part.num_documents for part in parts if is_done(args.output, part))
    progress = Progress(sum(part.num_documents for part in parts), done, args.quiet)
    try:
        if args.ray:
            failed = run_on_ray(
                parts,
                args,
                name,
                lambda part, counts: progress.done(part.num_documents, counts["chunks"]),
            )
        else:
            failed = asyncio.run(_run_here(parts, args, name, progress))
    finally:
        seconds = progress.close()
    _report(args.output, parts, skipped, progress, seconds)
    return failed


async def _run_here(
    parts: list[Part], args: argparse.Namespace, name: str, progress: Progress
) -> list[str]:
    made = build_run(args, on_chunk=progress.chunk)
    try:
        error = await run_parts(
            parts, made.rewriter, args.output, name, made.budget, 2 * args.concurrency
        )
    finally:
        await made.close()
    if isinstance(error, (ValueError, OSError)):
        raise error
    if isinstance(error, RuntimeError):  # a budget or the server
        return [f"{error}; the same command goes on from here"]
    if error is not None:
        raise error
    return []


def _list_prompts(library: Library) -> None:
    for code, table in library.languages.items():
        tasks = [task for task in TASKS if task.replace("-", "_") in table]
        print(f"{code}: {table['name']}, version {table['version']}, {', '.join(tasks)}")
        print(f"  styles        {' '.join(table['styles'])}")
        print(f"  perspectives  {' '.join(table['perspectives'])}")
    chosen = library.choose("", 1, 1, "rewrite", "en", "")[0]
    print(f"\n{chosen.id}, hash {chosen.hash}:\n")
    for message in chosen.messages("(the excerpt)", "(rewritten so far)", "(the passage)"):
        print(f"[{message['role']}]\n{message['content']}\n")


def _report(
    output: Path, parts: list[Part], skipped: Counter[str], progress: Progress, seconds: float
) -> None:
    counts: Counter[str] = read_counts(output, parts)
    counts["bad_records_skipped"] = skipped.total()
    figures = summary(counts, len(parts))
    write_json(output / "report.json", figures)
    print("\n".join(lines(figures)))
    rate = progress.chunks / max(seconds, 1e-9)
    unfinished = len(parts) - counts["parts"]
    left = f"; {unfinished} parts are unfinished, and their answers kept" if unfinished else ""
    print(
        f"[rephrase] {progress.chunks:,} chunks in {seconds:.1f} s ({rate:.1f}/s) this time; "
        f"{output / RECORDS} and report.json tell of published parts{left}"
    )
