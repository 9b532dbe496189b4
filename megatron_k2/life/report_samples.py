"""What the model said before a stage and after it, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_k2.html_page.parts import Html, more, shortened, tag
from megatron_k2.life.report_run import LifeRun, StageRun

LONGEST = 3_000  # characters of a sample
OPEN = 2  # samples of a stage that are open


def samples(run: LifeRun) -> Iterator[Html]:
    """Yield the samples of each stage that has some."""
    any_stage = False
    for stage in run.passed:
        if found := list(stage.done.get("samples") or ()):
            any_stage = True
            yield tag("h3", stage.name)
            yield from _pairs(stage, found)
    if not any_stage:
        yield tag("p", "No samples yet.", class_="soft")


def _pairs(stage: StageRun, found: list[Mapping[str, Any]]) -> Iterator[Html]:
    for one in found[:OPEN]:
        yield _pair(one)
    if len(found) > OPEN:
        yield more(f"{len(found) - OPEN} more of {stage.name}", *map(_pair, found[OPEN:]))


def _pair(one: Mapping[str, Any]) -> Html:
    sides = [(name, one.get(name)) for name in ("before", "after")]
    shown = [_side(name, said) for name, said in sides if said is not None]
    title = tag("p", str(one.get("title") or ""), class_="said")
    return tag("div", title, tag("div", *shown, class_="pair"), class_="sample")


def _side(name: str, said: Any) -> Html:
    words = said if isinstance(said, str) else str(said)
    inside = tag("pre", shortened(words, LONGEST) or " ")
    return tag("div", tag("b", name, class_="side"), inside, class_=f"quote {name}")
