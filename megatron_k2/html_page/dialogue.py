"""A dialogue on a page, turn by turn: OpenAI's messages, tool calls and results included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_k2.html_page.parts import Html, more, shortened, tag

LONGEST = 1_500  # characters of a message on the page
MAX_TURNS = 60


def turns(
    messages: Sequence[Mapping[str, Any]], result: Callable[[Mapping[str, Any]], str] | None = None
) -> Iterator[Html]:
    """Yield the turns of a dialogue; the system's words open when they are touched.

    Args:
        messages: in OpenAI's form.
        result: heading of a tool's message; None: its role.
    """
    for turn, message in enumerate(messages[:MAX_TURNS]):
        role = str(message["role"])
        content = shortened(str(message.get("content") or ""), LONGEST)
        if role == "system":
            yield more("system prompt", tag("div", content, class_="said"))
            continue
        inside: list[Html] = []
        head = role
        if thought := message.get("reasoning_content"):
            inside.append(more("thinks", tag("div", shortened(str(thought), LONGEST))))
        if role == "tool":
            head = result(message) if result else role
            inside.append(tag("pre", content))
        elif content:
            inside.append(tag("div", content, class_="said"))
        for asked in message.get("tool_calls") or ():
            function = asked["function"]
            words = f"{function.get('name')} {shortened(str(function.get('arguments')), LONGEST)}"
            inside.append(tag("pre", words))
        yield tag("div", tag("b", f"{turn} {head}"), *inside, class_=f"turn {role}")
    if len(messages) > MAX_TURNS:
        yield tag("p", f"{len(messages) - MAX_TURNS} more messages.", class_="soft")
