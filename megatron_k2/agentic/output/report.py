"""The report of a run: one static HTML file without scripts that loads nothing, for a phone too.

Counts of each stage, the coverage of categories, pass rates by level, category, form and fault,
why trajectories were dropped, how far judges agree, what was asked and spent, trajectories to read,
and where all of it comes from. The same data gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.agentic.judge.reasons import REASONS
from megatron_k2.agentic.output.figures import Outcome, Rate, by_faults, rates
from megatron_k2.agentic.output.samples import Sample, sample
from megatron_k2.html_page.parts import (
    NONE,
    Html,
    bar,
    counts,
    noted,
    page,
    picture,
    section,
    table,
    tag,
    text,
)

SCRIPTED = "scripted"
WARNING = (
    "A scripted model answered: the figures show that the pipeline works, and nothing about the "
    "quality of data that a language model would make."
)


@dataclass(frozen=True)
class ReportData:
    """What the page shows.

    Attributes:
        title: of the page.
        stages: name of a stage -> its counts, in their order.
        outcomes: of all trajectories (``figures.outcome``).
        samples: trajectories to read (``figures.choose``).
        coverage: PNG of tools by category; b"" for none.
        categories: category -> source -> tools.
        agreement: of ``judge.agreement.agreement``; {} for none.
        cost: role -> ``questions``, ``prompt tokens``, ``completion tokens`` and the like.
        settings: of the run, versions, hashes of inputs: name -> what.
        models: that answered; ``scripted`` brings a warning.
        notes: sentences under the title.
    """

    title: str
    stages: Mapping[str, Mapping[str, int]]
    outcomes: Sequence[Outcome]
    samples: Sequence[Sample] = ()
    coverage: bytes = b""
    categories: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[str] = ()
    notes: Sequence[str] = ()


def report(data: ReportData) -> str:
    """Return the page as HTML."""
    sections = {
        "stages": ("Stages", _stages(data)),
        "coverage": ("Tools by category", _coverage(data)),
        "rates": ("Pass rates", _rates(data)),
        "reasons": ("Why trajectories were dropped", _reasons(data)),
        "judges": ("Agreement of the judges", _judges(data)),
        "cost": ("Cost", _cost(data)),
        "samples": ("Trajectories", [sample(one) for one in data.samples]),
        "provenance": ("Where it comes from", _provenance(data)),
    }
    links = [tag("a", title, href=f"#{name}") for name, (title, _) in sections.items()]
    notes = [*data.notes, *([WARNING] if SCRIPTED in data.models else [])]
    return page(
        data.title,
        tag("h1", data.title),
        *(tag("p", note, class_="soft") for note in notes),
        _tiles(data),
        tag("nav", *links),
        *(section(name, title, *inside) for name, (title, inside) in sections.items()),
    )


def _tiles(data: ReportData) -> Html:
    kept = sum(one.passes for one in data.outcomes)
    total = len(data.outcomes)
    real = sum(one.executed == "real" for one in data.outcomes)
    tools = sum(sum(sources.values()) for sources in data.categories.values())
    figures = {
        "tools": f"{tools:,}",
        "trajectories": f"{total:,}",
        "kept": f"{kept:,}",
        "pass rate": f"{kept / total:.0%}" if total else NONE,
        "with real tools": f"{real:,}",
        "categories": f"{len(data.categories):,}",
    }
    tiles = [tag("div", tag("b", value), name, class_="tile") for name, value in figures.items()]
    return tag("div", *tiles, class_="tiles")


def _stages(data: ReportData) -> list[Html]:
    return [tag("div", *(_stage(*one) for one in data.stages.items()), class_="pair")]


def _stage(name: str, found: Mapping[str, int]) -> Html:
    return tag("div", tag("h3", name), counts("what", found))


def _coverage(data: ReportData) -> list[Html]:
    found = [picture(data.coverage, "Tools by category")] if data.coverage else []
    sources = sorted({name for one in data.categories.values() for name in one})
    rows = [
        (name, *(one.get(source, 0) for source in sources))
        for name, one in sorted(data.categories.items())
    ]
    return [*found, table(("category", *sources), rows)]


def _rates(data: ReportData) -> list[Html]:
    planted = [one for one in data.outcomes if one.planted]
    tables = [
        _rate_table("level", rates(data.outcomes, lambda one: [str(one.level)])),
        _rate_table("form", rates(data.outcomes, lambda one: [one.form])),
        _rate_table("execution", rates(data.outcomes, lambda one: [one.executed])),
        _rate_table("fault of a tool", rates(data.outcomes, by_faults)),
        _rate_table("planted mistake", rates(planted, lambda one: [one.planted])),
    ]
    categories = _rate_table("category", rates(data.outcomes, lambda one: [one.category]))
    words = "Intervals: Wilson's, 95 %, in per cent. A trajectory with two faults is in two rows."
    return [tag("p", words, class_="soft"), tag("div", *tables, class_="pair"), categories]


def _rate_table(head: str, found: Iterable[Rate]) -> Html:
    """Return a table of pass rates with bars and 95 % intervals."""
    rows = [
        (
            Html(text(one.name or NONE).replace("_", "_<wbr>")),
            tag("span", bar(one.share), f" {one.share:.0%}", class_="line"),
            tag("span", f"{one.passed:,} of {one.total:,}", class_="line"),
            tag("span", f"{100 * one.low:.0f} to {100 * one.high:.0f}", class_="line"),
        )
        for one in found
    ]
    return table((head, "kept", "", "interval"), rows)


def _reasons(data: ReportData) -> list[Html]:
    found = Counter(reason for one in data.outcomes for reason in one.reasons)
    most = max(found.values(), default=1)
    rows = [
        (noted(name, REASONS.get(name)), bar(number / most), number)
        for name, number in sorted(found.items(), key=lambda item: (-item[1], item[0]))
    ]
    words = "One trajectory may have several reasons."
    return [tag("p", words, class_="soft"), table(("reason", "", "number"), rows)]


def _judges(data: ReportData) -> list[Html]:
    words = (
        "On criteria that rules could not decide, beyond chance. A dash: not defined, since all "
        "votes are alike."
    )
    if data.agreement.get("judges", 0) < 2:
        words = (
            "Not measured: it takes two judges (--judge-passes 2, or several of --model-for "
            "judge=MODEL), and a criterion that rules leave open."
        )
    rows = [(name.replace("_", " "), _said(value)) for name, value in data.agreement.items()]
    return [tag("p", words, class_="soft"), table(("figure", "value"), rows)]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:,}" for name, number in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or NONE
    return NONE if value is None else f"{value:,}"


def _cost(data: ReportData) -> list[Html]:
    names = sorted({name for one in data.cost.values() for name in one})
    rows: list[tuple[Any, ...]] = [
        (role, *(one.get(name, 0) for name in names)) for role, one in data.cost.items()
    ]
    if rows:
        totals = [sum(one.get(name, 0) for one in data.cost.values()) for name in names]
        rows.append(("all", *totals))
    return [table(("role", *names), rows)]


def _provenance(data: ReportData) -> list[Html]:
    rows = [(name, value) for name, value in data.settings.items()]
    rows.append(("models", ", ".join(data.models) or NONE))
    return [table(("setting", "value"), rows)]
