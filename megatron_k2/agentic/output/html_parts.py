"""Pieces of a static page: everything from outside is escaped here and nowhere else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from megatron_k2.agentic.output.figures import Rate

NONE = "\u2013"  # shown where there is nothing
LOCKED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A policy that lets the browser load nothing: what a tool's result says stays text."""


class Html(str):
    """Text that is HTML already; any other text is escaped."""


def text(value: Any) -> str:
    """Return a value as HTML; numbers with thousands marked."""
    if isinstance(value, Html):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}"
    return escape(NONE if value is None else str(value))


def tag(name: str, *inside: Any, **attributes: str) -> Html:
    """Return an element; ``class_`` and the like lose their underscore."""
    marks = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{marks}>{''.join(map(text, inside))}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """Return a table that scrolls by itself; columns of numbers to the right."""
    lines = [list(row) for row in rows]
    if not lines:
        return tag("p", "None.", class_="soft")
    numbers = [
        all(isinstance(row[at], int | float) or row[at] is None for row in lines)
        for at in range(len(head))
    ]
    marks = [{"class_": "n"} if one else {} for one in numbers]
    top = tag("tr", *(tag("th", name, **mark) for name, mark in zip(head, marks, strict=True)))
    body = [
        tag("tr", *(tag("td", one, **mark) for one, mark in zip(row, marks, strict=True)))
        for row in lines
    ]
    return tag("div", tag("table", top, *body), class_="wide")


def counts(head: str, found: Mapping[str, Any]) -> Html:
    """Return a table of counts by name."""
    return table((head, "number"), found.items())


def rate_table(head: str, found: Iterable[Rate]) -> Html:
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


def bar(share: float) -> Html:
    """Return a bar of a share, 0 to 1."""
    width = f"width:{100 * min(1, max(0, share)):.1f}%"
    return tag("span", tag("i", style=width), class_="bar")


def picture(png: bytes, words: str) -> Html:
    """Return a PNG within the page."""
    data = base64.b64encode(png).decode()
    image = Html(f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">')
    return tag("div", image, class_="wide")


def noted(value: Any, note: Any) -> Html:
    """Return a value with a remark under it."""
    return tag("div", value, tag("div", note, class_="soft") if note else "")


def more(summary: Any, *inside: Any) -> Html:
    """Return what opens when it is touched."""
    return tag("details", tag("summary", summary), *inside)


def section(name: str, title: str, *inside: Any) -> Html:
    """Return a section with its heading; ``name`` is its anchor."""
    return tag("section", tag("h2", title), *inside, id=name)


def page(title: str, *inside: Any) -> str:
    """Return a whole page that needs nothing else."""
    style = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(LOCKED)}">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    body = "".join(map(text, inside))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
