"""What a server's JSON says, or None if it is not what the interface promises.

Servers differ: content as a list of parts, usage as text or missing, half of a surrogate pair,
brackets without end. What has one meaning is read, all else is "unreadable" and asked again.
Thoughts of a model that thinks aloud (`<think>...</think>` before its answer; some templates put
the first tag into the prompt) are cut off; `reasoning_content` is not looked at. Tool calls are
brought into one form, their arguments as the model wrote them, valid JSON or not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_THOUGHTS = re.compile(r"\A(?:\s*<think>)?((?!<think>).)*?</think>\s*", re.DOTALL)
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True)
class Reply:
    """What was read: a text and calls, or vectors, and the tokens that the server counted."""

    usage: dict[str, int]
    text: str = ""
    finish_reason: str = ""
    thought: bool = False  # thoughts were cut off
    vectors: Sequence[list[float]] = ()
    message: dict[str, Any] = field(default_factory=dict)  # with the text, and tool_calls if any

    @property
    def total_tokens(self) -> int | None:
        """What the request cost, None if the server does not say."""
        if "total_tokens" in self.usage:
            return self.usage["total_tokens"]
        parts = [self.usage.get(name) for name in _COUNTS[:2]]
        return None if None in parts else sum(part or 0 for part in parts)


def read_chat(value: Any) -> Reply | None:
    """Return the reply of /chat/completions."""
    try:
        choice = value["choices"][0]
        content = choice["message"].get("content")
        calls = read_calls(choice["message"].get("tool_calls"))
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if content is None:
        content = ""
    elif isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str) or calls is None:
        return None
    whole = _whole(content)
    text = _THOUGHTS.sub("", whole, count=1)
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else ""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    return Reply(_usage(value), text, reason, text != whole, message=message)


def read_calls(value: Any) -> list[dict[str, Any]] | None:
    """Return an answer's tool calls, [] for none; None if they cannot be read.

    A call without an id gets Kimi K2's, `functions.NAME:INDEX`; arguments given as an object
    become its JSON text.
    """
    if not value:
        return []
    if not isinstance(value, list):
        return None
    found = []
    for index, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not isinstance(function, dict):
            return None
        given = function.get("arguments")
        arguments = given if isinstance(given, str) else json.dumps({} if given is None else given)
        found.append(
            {
                "id": str(call.get("id") or f"functions.{name}:{index}"),
                "type": "function",
                "function": {"name": _whole(name), "arguments": _whole(arguments)},
            }
        )
    return found


def read_vectors(value: Any, count: int) -> Reply | None:
    """Return the reply of /embeddings, a vector a text, in their order."""
    try:
        rows = sorted(value["data"], key=lambda row: row.get("index", 0))
        vectors = [[float(number) for number in row["embedding"]] for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    sizes = {len(vector) for vector in vectors}
    if len(vectors) != count or len(sizes) > 1 or 0 in sizes:
        return None
    if not all(math.isfinite(number) for vector in vectors for number in vector):
        return None
    return Reply(_usage(value), vectors=vectors)


def _whole(text: str) -> str:
    """Return a text without halves of surrogate pairs."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _joined(parts: list[Any]) -> str | None:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if len(known) == len(texts) else None


def _usage(value: dict[str, Any]) -> dict[str, int]:
    """Return the counts that are numbers."""
    used = value.get("usage")
    found = used if isinstance(used, dict) else {}
    return {
        name: found[name]
        for name in _COUNTS
        if isinstance(found.get(name), int) and not isinstance(found[name], bool)
        if 0 < found[name] < 1 << 40
    }
