"""Pieces of a static page: everything from outside is escaped here and nowhere else.

A page is one file that loads nothing: its policy forbids the browser every request and every script
but one whose bytes are named by their hash, so that a sample or a tool's result stays text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

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
    """Return an element; ``class_`` loses its underscore, ``aria_label`` has a hyphen for it."""
    marks = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
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


def shortened(text: str, longest: int) -> str:
    """Return a text with its middle left out, and how much of it."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


def page(title: str, *inside: Any, style: str = "", script: str = "") -> str:
    """Return a whole page that needs nothing else.

    Args:
        title: of the window.
        inside: of the body.
        style: CSS after that of all pages.
        script: JavaScript that may run, at the end of the body; empty: none may.

    Raises:
        ValueError: style or script would end its own element.
    """
    if "</" in style or "</" in script:
        raise ValueError("style and script of a page must not contain '</'")
    policy = LOCKED
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"{LOCKED}; script-src 'sha256-{digest}'"
    style = resources.files(__package__).joinpath("page.css").read_text("utf-8") + style
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    body = "".join(map(text, inside)) + (f"<script>{script}</script>" if script else "")
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
