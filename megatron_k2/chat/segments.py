"""One message of a dialogue as segments: control tokens and the texts between them.

Each segment knows its owner, so that loss masks and ledgers need no second parser. The order of
the parts is that of Moonshot's templates; the words are a ``Template``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_k2.chat.release_template import sorted_keys
from megatron_k2.chat.template_files import Template

Message = Mapping[str, Any]
Part = Literal["head", "reasoning", "content", "calls", "end"]


@dataclass(frozen=True)
class Owner:
    """Whose a segment is.

    Attributes:
        role: of the message; ``tool_declare`` for the declarations.
        turn: place of the message in the dialogue; -1 for what the template adds.
        part: ``head`` up to the mark after the role, ``end`` from the mark after the message.
        is_produced: the assistant says this, in answer to what stands before it.
        is_stripped: of a message whose reasoning was left out: not what the assistant said.
    """

    role: str
    turn: int
    part: Part
    is_produced: bool = False
    is_stripped: bool = False


class Segment(NamedTuple):
    """A stretch of a rendered dialogue: one control token's name, or ordinary text.

    A mark of ``reasoning`` is a control token only where the tokenizer names it.
    """

    text: str
    is_control: bool
    owner: Owner


def opening(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, template: Template
) -> list[Segment]:
    """Return what the template puts before the messages: declarations, a system message."""
    found = []
    if tools:
        declared = json.dumps(sorted_keys(list(tools)), ensure_ascii=False, separators=(",", ":"))
        found += _added(template.tool_declare, declared, template)
    if not messages or messages[0]["role"] != "system":
        found += _added("system", template.default_system, template)
        if template.after_default_system:
            owner = Owner("system", -1, "end")
            found.append(Segment(template.after_default_system, False, owner))
    return found


def message_segments(
    message: Message, turn: int, template: Template, keeps_reasoning: bool = True
) -> list[Segment]:
    """Return one message, from its head to its end; see ``segments``."""
    role = message["role"]
    found = _head(role, str(message.get("name") or role), turn, template)
    if role == "assistant":
        return found + _answer(message, turn, template, keeps_reasoning)
    text = _text(message)
    if role == "tool":
        text = template.tool_return.format(id=message.get("tool_call_id") or "") + text
    if text:
        found.append(Segment(text, False, Owner(role, turn, "content")))
    found.append(Segment(template.end, True, Owner(role, turn, "end")))
    return found


def generation_prompt(turn: int, template: Template) -> list[Segment]:
    """Return the head of the assistant's next message, the ``turn``-th of the dialogue."""
    return _head("assistant", "assistant", turn, template)


def _added(role: str, text: str, template: Template) -> list[Segment]:
    """Return a message that is the template's own."""
    found = _head(role, role, -1, template)
    found.append(Segment(text, False, Owner(role, -1, "content")))
    found.append(Segment(template.end, True, Owner(role, -1, "end")))
    return found


def _head(role: str, name: str, turn: int, template: Template) -> list[Segment]:
    owner = Owner(role, turn, "head")
    mark, middle = template.head(role), template.middle
    return [Segment(mark, True, owner), Segment(name, False, owner), Segment(middle, True, owner)]


def _answer(
    message: Message, turn: int, template: Template, keeps_reasoning: bool
) -> list[Segment]:
    """Return what an assistant says: reasoning, content, calls and the end."""
    reasoning = str(message.get("reasoning_content") or "") if template.reasoning else ""
    stripped = bool(reasoning) and not keeps_reasoning
    parts: tuple[Part, ...] = ("reasoning", "content", "calls", "end")
    thought, content, calls, end = (
        Owner("assistant", turn, part, is_produced=True, is_stripped=stripped) for part in parts
    )
    found = []
    if template.reasoning:
        found.append(Segment(template.reasoning[0], True, thought))
        if reasoning and keeps_reasoning:
            found.append(Segment(reasoning, False, thought))
        found.append(Segment(template.reasoning[1], True, thought))
    if text := _text(message):
        found.append(Segment(text, False, content))
    if message.get("tool_calls"):
        found += _calls(message["tool_calls"], calls, template)
    found.append(Segment(template.end, True, end))
    return found


def _calls(
    calls: Sequence[Mapping[str, Any]], owner: Owner, template: Template
) -> Iterator[Segment]:
    marks = template.calls
    yield Segment(marks.section_begin[0], True, owner)
    for call in calls:
        try:
            name, arguments = str(call["id"]), call["function"]["arguments"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"message {owner.turn}: a tool call needs id and function.arguments, not {call!r}"
            ) from error
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not isinstance(arguments, str):
            raise ValueError(
                f"message {owner.turn}: arguments of {name!r:.60} must be JSON text or an object, "
                f"not {arguments!r:.60}"
            )
        yield Segment(marks.call_begin[0], True, owner)
        if name:
            yield Segment(name, False, owner)
        yield Segment(marks.arguments_begin[0], True, owner)
        if arguments:
            yield Segment(arguments, False, owner)
        yield Segment(marks.call_end[0], True, owner)
    yield Segment(marks.section_end[0], True, owner)


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    texts = []
    for part in content if isinstance(content, list | tuple) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            role = message["role"]
            raise ValueError(f"content of a {role} message is not only text: {content!r:.200}")
        texts.append(text)
    return "".join(texts)
