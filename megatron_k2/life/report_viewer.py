"""The episode viewer: pick a stage, an environment, a verdict, then an episode, and read it.

Every episode is on the page and opens by a touch; the picker alone needs the page's script, and is
hidden where scripts do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_k2.html_page.chart import Chart, Line, chart
from megatron_k2.html_page.parts import Html, more, tag
from megatron_k2.life.report_episodes import Shown

ALL = "all"


def viewer(found: Sequence[Shown]) -> Iterator[Html]:
    """Yield the picker and the episodes."""
    if not found:
        yield tag("p", "No episodes yet.", class_="soft")
        return
    yield tag("p", _count(found), class_="soft")
    yield from _maps(found)
    yield _picker(found)
    yield tag("div", *(_episode(at, one) for at, one in enumerate(found)), class_="episodes")


def _maps(found: Sequence[Shown]) -> Iterator[Html]:
    """Yield a chart a stage: each dot is an episode, and leads to it."""
    for stage in dict.fromkeys(one.stage for one in found):
        placed = [
            (at, one.verdict, (float(one.step), one.reward))
            for at, one in enumerate(found)
            if one.stage == stage and one.step is not None and one.reward is not None
        ]
        lines = [
            Line(
                verdict,
                [place for _, kind, place in placed if kind == verdict],
                links=[f"#episode-{at}" for at, kind, _ in placed if kind == verdict],
            )
            for verdict in sorted({kind for _, kind, _ in placed})
        ]
        if lines:
            note = "Each dot is an episode; touch one to read it."
            title = f"{stage}: episodes to read"
            yield tag("div", chart(Chart(title, "step", "reward", lines, note=note)), class_="map")


def _count(found: Sequence[Shown]) -> str:
    by_stage: dict[str, int] = {}
    for one in found:
        by_stage[one.stage] = by_stage.get(one.stage, 0) + 1
    told = ", ".join(f"{number} of {stage}" for stage, number in by_stage.items())
    return f"{len(found)} to read: {told}. Chosen to be as different as there are some."


def _picker(found: Sequence[Shown]) -> Html:
    filters: dict[str, Callable[[Shown], str]] = {
        "stage": lambda one: one.stage,
        "kind": lambda one: one.kind,
        "verdict": lambda one: one.verdict,
    }
    names = {"stage": "Stage", "kind": "Environment", "verdict": "Verdict"}
    fields = [
        _choice(key, names[key], [ALL, *sorted({of(one) for one in found})])
        for key, of in filters.items()
    ]
    titles = [
        tag("option", f"{at + 1}. {one.title}", value=f"{at}") for at, one in enumerate(found)
    ]
    episode = tag("label", "Episode", tag("select", *titles, data_pick="episode"), class_="wider")
    buttons = [
        tag("button", words, type="button", data_step=step)
        for words, step in (("← previous", "-1"), ("next →", "1"))
    ]
    counted = tag("output", "", class_="soft")
    steps = tag("div", *buttons, counted, class_="steps")
    return tag("form", *fields, episode, steps, class_="picker", hidden="")


def _choice(key: str, name: str, values: Sequence[str]) -> Html:
    options = [tag("option", value) for value in values]
    return tag("label", name, tag("select", *options, data_pick=key))


def _episode(at: int, one: Shown) -> Html:
    marks = {"data_stage": one.stage, "data_kind": one.kind, "data_verdict": one.verdict}
    kind = "kept" if one.verdict in ("right", "kept") else "dropped"
    dot = tag("span", "●", class_=kind if one.verdict != "unjudged" else "soft", aria_hidden="true")
    # The name is within what opens, so that a link to it opens it, without a script too.
    body = tag("div", *one.body, id=f"episode-{at}")
    return tag("article", more(tag("span", dot, f" {one.stage} · {one.title}"), body), **marks)
