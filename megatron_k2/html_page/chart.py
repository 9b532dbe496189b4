"""Line charts as inline SVG: no script, no picture file, light and dark by the page's own colours.

Lines differ in colour (Okabe and Ito's, told apart by the colour-blind) and in dashes. Each point
says its value where a mouse rests; the same numbers open as a table for whom that does not help.
The drawing is as wide as a phone, so that its letters are legible there; a wide chart has a second
drawing for wide screens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from megatron_k2.html_page.parts import Html, more, table, tag
from megatron_k2.html_page.scale import Scale, around, number, thinned, ticks

NARROW, WIDE = (360, 210), (1060, 300)  # of a drawing, in its own units: CSS pixels on its screen
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 32  # margins around the axes
MOST_POINTS, MOST_TOLD, MOST_ROWS = 400, 60, 14
SIZES = {"dot": "3.5", "hover": "5"}  # of the marks of points
NUM_COLOURS = 7  # of chart.css: .c0 to .c6

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: in the legend.
        points: (x, y), in the order of x; what is not finite is left out.
        band: (x, low, high), drawn behind the line.
        dotted: points are marked, for lines of few points.
        links: where each point leads; then points are marked and not joined, and none is left out.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    dotted: bool = False
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: what is shown.
        x: name of the horizontal axis.
        unit: of the vertical one.
        lines: one or more.
        levels: (name, y) of dashed lines across.
        floor: the vertical axis begins there or below.
        note: a sentence below.
        wide: it takes the width of the page.
    """

    title: str
    x: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()
    floor: float | None = None
    note: str = ""
    wide: bool = False


def style() -> str:
    """Return the CSS that charts need on their page."""
    return resources.files(__package__).joinpath("chart.css").read_text("utf-8")


def chart(one: Chart) -> Html:
    """Return a figure, or a line that says that there is nothing to draw."""
    lines = [(at, line, _finite(line.points)) for at, line in enumerate(one.lines)]
    drawn = [(at, line, points) for at, line, points in lines if points]
    title = tag("figcaption", tag("b", one.title))
    if not drawn:
        return tag("figure", title, tag("p", "No values.", class_="soft"), class_="chart")
    sizes = {"narrow": NARROW, "wide": WIDE} if one.wide else {"both": NARROW}
    pictures = [_picture(one, drawn, size, kind) for kind, size in sizes.items()]
    note = [tag("p", one.note, class_="soft")] if one.note else []
    numbers = [] if any(line.links for line in one.lines) else [_numbers(one, drawn)]
    return tag("figure", title, _legend(drawn), *pictures, *note, *numbers, class_="chart")


Drawn = tuple[int, Line, list[Point]]


def _finite(points: Sequence[Point]) -> list[Point]:
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return thinned(kept, MOST_POINTS)


def _picture(one: Chart, drawn: Sequence[Drawn], size: tuple[int, int], kind: str) -> Html:
    across, upward = _scales(one, drawn, size)
    marks = [*_axes(one, across, upward), *_levels(one, across, upward)]
    for at, line, points in drawn:
        marks += _line(at, line, points, across, upward, one)
    # A picture with links in it is no single image to a screen reader.
    role = "group" if any(line.links for line in one.lines) else "img"
    box, words = f"0 0 {size[0]} {size[1]}", _spoken(one, drawn)
    return tag("svg", *marks, viewBox=box, role=role, aria_label=words, class_=f"drawing {kind}")


def _scales(one: Chart, drawn: Sequence[Drawn], size: tuple[int, int]) -> tuple[Scale, Scale]:
    xs = [x for _, _, points in drawn for x, _ in points]
    ys = [y for _, _, points in drawn for _, y in points]
    ys += [side for line in one.lines for _, low, high in line.band for side in (low, high)]
    ys += [y for _, y in one.levels]
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 1, last + 1
    width, height = size
    across = Scale(first, last, LEFT, width - RIGHT)
    return across, Scale(*around(ys, one.floor), height - BOTTOM, TOP)


def _axes(one: Chart, across: Scale, upward: Scale) -> Iterator[Html]:
    for y in ticks(upward.low, upward.high):
        yield _rule(across, upward(y), "grid")
        yield _text(number(y), across.start - 5, upward(y) + 4, "end")
    for x in ticks(across.low, across.high):
        if across.low.is_integer() and not float(x).is_integer():
            continue  # between two steps
        yield _text(number(x), across(x), upward.start + 15, "middle")
    yield _rule(across, upward.start, "axis")
    yield _text(one.unit, 2, 12, "start")
    yield _text(one.x, across.end, upward.start + 29, "end")


def _levels(one: Chart, across: Scale, upward: Scale) -> Iterator[Html]:
    for name, y in one.levels:
        yield _rule(across, upward(y), "level")
        yield _text(f"{name} {number(y)}", across.end, upward(y) - 4, "end")


def _rule(across: Scale, y: float, kind: str) -> Html:
    left, right, at = f"{across.start:.0f}", f"{across.end:.0f}", f"{y:.1f}"
    return tag("line", x1=left, x2=right, y1=at, y2=at, class_=kind)


def _line(
    at: int, line: Line, points: Sequence[Point], across: Scale, upward: Scale, one: Chart
) -> Iterator[Html]:
    colour = _colour(at)
    if line.band:
        band = [(x, low) for x, low, _ in line.band]
        band += [(x, high) for x, _, high in reversed(line.band)]
        outline = " ".join(f"{across(x):.1f},{upward(y):.1f}" for x, y in band)
        yield tag("polygon", points=outline, class_=f"band {colour}")
    places = [(f"{across(x):.1f}", f"{upward(y):.1f}") for x, y in points]
    if not line.links:
        path = " ".join(f"{x},{y}" for x, y in places)
        yield tag("polyline", points=path, class_=f"curve {colour}")
    dot = "dot" if line.dotted or line.links or len(points) == 1 else "hover"
    told = range(len(points)) if dot == "dot" else thinned(range(len(points)), MOST_TOLD)
    for place in told:
        (x, y), (left, top) = points[place], places[place]
        words = tag("title", f"{line.name}: {number(y)} {one.unit} at {one.x} {number(x)}")
        mark = tag("circle", words, cx=left, cy=top, r=SIZES[dot], class_=f"{dot} {colour}")
        yield tag("a", mark, href=line.links[place]) if line.links else mark


def _colour(at: int) -> str:
    return f"c{at % NUM_COLOURS}"


def _text(words: str, x: float, y: float, anchor: str) -> Html:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _legend(drawn: Sequence[Drawn]) -> Html:
    names = []
    for at, line, points in drawn:
        marks = []
        if not line.links:
            curve = f"curve {_colour(at)}"
            marks.append(tag("line", x1="0", x2="24", y1="4", y2="4", class_=curve))
        if line.dotted or line.links:
            marks.append(tag("circle", cx="12", cy="4", r="3", class_=f"dot {_colour(at)}"))
        swatch = tag("svg", *marks, viewBox="0 0 24 8", class_="swatch", aria_hidden="true")
        last = len(points) if line.links else number(points[-1][1])
        names.append(tag("span", swatch, line.name, " ", tag("b", last)))
    return tag("div", *names, class_="legend")


def _spoken(one: Chart, drawn: Sequence[Drawn]) -> str:
    said = [
        f"{line.name} from {number(points[0][1])} to {number(points[-1][1])} {one.unit}, "
        f"{one.x} {number(points[0][0])} to {number(points[-1][0])}"
        for _, line, points in drawn
    ]
    return f"{one.title}: {'; '.join(said)}"


def _numbers(one: Chart, drawn: Sequence[Drawn]) -> Html:
    by_line = [dict(points) for _, _, points in drawn]
    rows = thinned(sorted({x for points in by_line for x in points}), MOST_ROWS)
    told = [
        [number(x), *(number(points[x]) if x in points else None for points in by_line)]
        for x in rows
    ]
    return more("numbers", table((one.x, *(line.name for _, line, _ in drawn)), told))
