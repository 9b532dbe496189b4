"""The top of the report: the whole life at a glance, and every figure before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_k2.html_page.parts import NONE, Html, noted, table, tag
from megatron_k2.html_page.scale import number
from megatron_k2.life.report_run import Figure, LifeRun, StageRun, State

MARKS: dict[State, str] = {"passed": "✓", "begun": "…", "not run": "·"}
ARROW = "→"
GOOD, BAD = ("✓", "better", "kept"), ("✗", "not better", "dropped")  # mark, words, class


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def tiles(run: LifeRun, more: Iterable[tuple[str, str]] = ()) -> Html:
    """Return the figures of the whole run in boxes.

    Args:
        run: the run.
        more: (value, name) of further boxes.
    """
    figures = [one for stage in run.passed for one in stage.figures if one.improved is not None]
    found = [
        (f"{len(run.passed)} of {len(run.stages)}", "stages passed"),
        (duration(sum(one.seconds for one in run.passed)), "in all"),
        (f"{sum(bool(one.improved) for one in figures)} of {len(figures)}", "figures improved"),
        *more,
    ]
    boxes = [tag("div", tag("b", value), name, class_="tile") for value, name in found]
    return tag("div", *boxes, class_="tiles")


def timeline(run: LifeRun) -> Html:
    """Return a bar of the stages, each as long as its share of the time."""
    if not run.passed:
        return Html("")
    total = sum(one.seconds for one in run.passed) or 1.0
    pieces = [
        tag(
            "i",
            tag("span", one.name) if one.seconds > 0.1 * total else "",
            style=f"flex-grow:{max(one.seconds / total, 0.002):.4f}",
            title=f"{one.name}: {duration(one.seconds)}",
        )
        for one in run.passed
    ]
    return tag("div", *pieces, class_="timeline", aria_hidden="true")


def strip(run: LifeRun) -> Html:
    """Return the stages in their order, each with its state, its time and its figures."""
    cards = [_card(at, one) for at, one in enumerate(run.stages, start=1)]
    return tag("ol", *cards, class_="life")


def _card(at: int, one: StageRun) -> Html:
    kind = one.state.replace(" ", "-")
    mark = tag("span", f"{MARKS[one.state]} {one.state}", class_=f"state {kind}")
    time = tag("span", duration(one.seconds), class_="time") if one.state == "passed" else ""
    figures = [tag("li", _change(figure)) for figure in one.figures[:2]]
    name = tag("b", f"{at} {one.name}")
    if one.state == "passed":
        name = tag("a", name, href=f"#stage-{one.name}")
    return tag(
        "li",
        tag("div", name, mark, class_="head"),
        tag("p", one.title, class_="soft") if one.title else "",
        tag("ul", *figures) if figures else "",
        time,
        class_=f"stage {kind}",
    )


def _change(one: Figure) -> Html:
    """Return a figure's way; better and worse by a mark too, not by colour alone."""
    mark = Html("")
    if one.improved is not None:
        sign, words, kind = GOOD if one.improved else BAD
        mark = tag("span", f" {sign}", class_=kind, title=words, aria_label=words, role="img")
    unit = tag("span", f" {one.unit}", class_="soft") if one.unit else ""
    name = tag("div", one.name, class_="soft")
    return tag("div", name, tag("div", _way(one), unit, mark, class_="change"))


def _way(one: Figure) -> Html:
    after = tag("b", NONE if one.after is None else number(one.after))
    before = [] if one.before is None else [number(one.before), f" {ARROW} "]
    return tag("span", *before, after, class_="line")


def missing(run: LifeRun) -> Html:
    """Return which stages have no result yet; nothing where all have."""
    lacking = [one for one in run.stages if one.state != "passed"]
    if not lacking:
        return Html("")
    names = ", ".join(
        f"{one.name} ({'begun' if one.state == 'begun' else 'not run'})" for one in lacking
    )
    words = f"This life is not complete. Missing: {names}. Run it again, and it goes on."
    return tag("p", words, class_="warning")


def figure_table(run: LifeRun) -> Html:
    """Return every figure of every stage; what has nothing before it had a bound to meet."""
    rows: list[Sequence[object]] = [
        (
            stage.name,
            noted(one.name, _wanted(one)),
            tag("div", _way(one), " ", _verdict(one)),
        )
        for stage in run.passed
        for one in stage.figures
    ]
    return table(("stage", "figure", "before and after"), rows)


def _wanted(one: Figure) -> str:
    better = "" if one.before is None else f"{one.better} is better"
    return ", ".join(filter(None, [one.unit, better]))


def _verdict(one: Figure) -> Html:
    if one.improved is None:
        return tag("span", GOOD[0], " within its bound", class_="soft line")
    sign, words, kind = GOOD if one.improved else BAD
    return tag("span", f"{sign} {words}", class_=f"{kind} line")
