"""A trajectory as a judge reads it, and the search for what a judge quotes from it.

The dialogue goes to the judge as one JSON text in one field, so that no message in it can pose as
the question. A quote counts if it stands word for word in a message, a result or a call's
arguments: runs of white space are one space, nothing else is forgiven.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_k2.agentic.records import Trajectory

MAX_SHOWN = 6_000  # characters of a message: a giant result says no more to a judge
MIN_QUOTE = 8  # characters: fewer prove nothing, unless they are a whole message
MAX_QUOTE = 600


def transcript(trajectory: Trajectory) -> str:
    """Return a trajectory as JSON text, long messages cut in their middle."""
    lines = []
    for turn, message in enumerate(trajectory.messages):
        line: dict[str, Any] = {"turn": turn, "role": message["role"]}
        if message.get("content"):
            line["content"] = shortened(str(message["content"]))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        if calls:
            line["calls"] = [
                {"tool": str(one.get("name")), "arguments": shortened(_text(one.get("arguments")))}
                for one in calls
            ]
        lines.append(line)
    return json.dumps([*lines, {"ending": trajectory.ending}], ensure_ascii=False)


def shortened(text: str, longest: int = MAX_SHOWN) -> str:
    """Return a text with its middle left out, and how much of it."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


def pieces(trajectory: Trajectory) -> Iterator[str]:
    """Yield what may be quoted: messages, results, arguments, names of called tools."""
    for message in trajectory.messages:
        if message.get("content"):
            yield str(message["content"])
        for call in message.get("tool_calls") or ():
            function = call["function"]
            yield _text(function.get("arguments"))
            yield f"{function.get('name')} {_text(function.get('arguments'))}"


def quoted(trajectory: Trajectory, quote: str) -> bool:
    """Return whether a quote stands word for word in a trajectory and says something."""
    wanted = " ".join(quote.split())
    if not wanted or len(wanted) > MAX_QUOTE:
        return False
    for piece in pieces(trajectory):
        text = " ".join(piece.split())
        if wanted in text and (len(wanted) >= MIN_QUOTE or wanted == text):
            return True
    return False


def _text(arguments: Any) -> str:
    if isinstance(arguments, Mapping):
        return json.dumps(arguments, ensure_ascii=False)
    return str(arguments or "")
