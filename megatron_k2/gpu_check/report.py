"""The report that is sent back: one JSON file, and the same to read in Markdown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_k2.gpu_check.check import RUNGS, Check, Figure, Outcome
from megatron_k2.training.stages import write_json

REHEARSAL = "**A rehearsal on a CPU.** It shows that the ladder works; it says nothing about a GPU."
Done = Sequence[tuple[Check, Outcome]]


def write_report(folder: Path, machine: dict[str, Any], done: Done) -> Path:
    """Write ``report.json`` and ``report.md``; return the latter.

    Args:
        folder: of the run.
        machine: of ``machine.describe``; a name of the host if it is wanted.
        done: every check of the selection with its outcome.
    """
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    checks = [{"rung": c.rung, "proves": c.proves, **o.as_json()} for c, o in done]
    write_json(folder / "report.json", {"date": date, "machine": machine, "checks": checks})
    path = folder / "report.md"
    partial = path.with_suffix(".md.partial")
    partial.write_text(markdown(date, machine, done), encoding="utf-8")
    partial.replace(path)
    return path


def markdown(date: str, machine: dict[str, Any], done: Done) -> str:
    """Return the report as text."""
    lines = ["# Megatron-K2 on GPUs", "", summary(done), ""]
    if machine["device"] == "cpu":
        lines += [REHEARSAL, ""]
    lines += [f"{date}; commit {machine['commit']}", "", "| | |", "|---|---|"]
    for name, value in machine.items():
        if name == "packages":
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v)
        lines.append(f"| {name.replace('_', ' ')} | {value} |")
    for rung, where in RUNGS.items():
        some = [(check, outcome) for check, outcome in done if check.rung == rung]
        if some:
            lines += ["", f"## Rung {rung}: {where}", ""]
            for check, outcome in some:
                lines += _section(check, outcome)
    return "\n".join(lines) + "\n"


def summary(done: Done) -> str:
    """Return one line: how many passed, failed and were not run."""
    found = [outcome.status for _, outcome in done]
    return (
        f"{found.count('passed')} passed, {found.count('failed')} failed, "
        f"{found.count('not run')} not run"
    )


def _section(check: Check, outcome: Outcome) -> list[str]:
    seconds = f", {outcome.seconds:.0f} s" if outcome.seconds else ""
    lines = [f"### {check.name}: {outcome.status}{seconds}", "", f"Proves: {check.proves}."]
    if outcome.reason:
        first, *rest = outcome.reason.splitlines()
        lines += ["", f"{first}", *(["```", *rest, "```"] if rest else [])]
    if outcome.figures:
        lines += ["", "| figure | found | bound | why |", "|---|---|---|---|"]
        lines += [_row(figure) for figure in outcome.figures]
    return [*lines, ""]


def _row(figure: Figure) -> str:
    mark = "" if figure.is_within else " **outside**"
    value = f"{figure.value:.4g} {figure.unit}".strip()
    bound, reason = (figure.bound.text(), figure.bound.reason) if figure.bound else ("", "")
    return f"| {figure.name} | {value}{mark} | {bound} | {reason} |"


def line(check: Check, outcome: Outcome, is_kept: bool) -> str:
    """Return a check's outcome for the terminal."""
    text = f"[{check.name}] {outcome.status}"
    if outcome.reason:
        text += f": {outcome.reason}"
    text += f"  ({outcome.seconds:.0f} s)" if outcome.status != "not run" else ""
    text += "  kept from before; --again repeats it" if is_kept else ""
    figures = [
        f"    {one.name} {one.value:.4g} {one.unit}".rstrip()
        + (f" ({one.bound.text()})" if one.bound else "")
        + ("" if one.is_within else "  OUTSIDE")
        for one in outcome.figures
    ]
    return "\n".join([text, *figures])
