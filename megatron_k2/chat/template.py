"""Kimi K2's chat format: messages to text in which control tokens and content are kept apart.

The rules are those of the ``chat_template.jinja`` of K2-Instruct and K2-Instruct-0905 and of the
released tokenizer class, which sorts the keys of tool declarations. Sources: Moonshot's tool-call
guide; github.com/PrimeIntellect-ai/renderers (``kimi_k2.py``), which is tested byte for byte
against the template of revision fd1984e2; renders of the official template in
github.com/YS-OH-CORE/canitoolcall (``fixtures/kimi``). No white space stands between messages,
with one exception: a line feed follows the default system message.

``segments`` is for training data: what a message says can never become a control token.
``render_template`` runs a release's own template in jinja2's sandbox, as transformers does.
Left out: images, and K2-Thinking's reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_k2.chat.tokenizer import KimiTokenizer

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
_MARKS = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}  # any other role: <|im_system|>
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered dialogue: one control token's name, or ordinary text."""

    text: str
    is_control: bool = False


def segments(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> list[Segment]:
    """Return a dialogue as control tokens and the texts between them.

    Args:
        messages: ``role`` and ``content``; an assistant's ``tool_calls`` with ``id`` and
            ``function`` (``arguments`` a JSON string or an object); a tool's ``tool_call_id``.
            ``name`` takes the place of the role in the text.
        tools: declarations in OpenAI's form.
        add_generation_prompt: end with the head of an assistant's message.

    Raises:
        ValueError: content that is neither text nor a list of texts.
    """
    found = list(_pieces(messages, tools, add_generation_prompt))
    joined = []
    for is_control, group in groupby(found, attrgetter("is_control")):
        if is_control:
            joined += list(group)
        elif text := "".join(segment.text for segment in group):
            joined.append(Segment(text))
    return joined


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return a dialogue as one string; see ``segments``."""
    return "".join(part.text for part in segments(messages, tools, add_generation_prompt))


def encode(tokenizer: KimiTokenizer, parts: Sequence[Segment]) -> list[int]:
    """Return the ids of segments; only control segments give special ids."""
    ids: list[int] = []
    for part in parts:
        if part.is_control:
            ids.append(tokenizer.special_id(part.text))
        else:
            ids += tokenizer.encode(part.text)
    return ids


def sorted_keys(value: Any) -> Any:
    """Return JSON data with the keys of every object sorted."""
    if isinstance(value, Mapping):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list | tuple) else value


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return a release's chat template: the file, else tokenizer_config.json's, else None."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in given}
        given = named.get("default")
    return given if isinstance(given, str) else None


def render_template(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """Render a jinja chat template as transformers does, in the sandbox.

    Args:
        template: its text; it is not trusted.
        messages: the dialogue.
        variables: ``tools``, ``add_generation_prompt`` and what else the template reads.

    Raises:
        ValueError: the template does not render.
    """
    import jinja2

    try:
        return str(_compiled(template).render(messages=messages, **variables))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template does not render: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """Serialise as transformers' filter does: jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _pieces(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> Iterator[Segment]:
    if tools:
        declared = json.dumps(sorted_keys(list(tools)), ensure_ascii=False, separators=(",", ":"))
        yield from _head("system", "tool_declare")
        yield from (Segment(declared), Segment("<|im_end|>", True))
    if not messages or messages[0]["role"] != "system":
        yield from _head("system", "system")
        yield from (Segment(DEFAULT_SYSTEM), Segment("<|im_end|>", True), Segment("\n"))
    for message in messages:
        role = message["role"]
        yield from _head(role, message.get("name") or role)
        if role == "tool":
            yield Segment(f"## Return of {message.get('tool_call_id') or ''}\n")
        yield Segment(_text(message))
        if role == "assistant" and message.get("tool_calls"):
            yield from _calls(message["tool_calls"])
        yield Segment("<|im_end|>", True)
    if add_generation_prompt:
        yield from _head("assistant", "assistant")


def _head(role: str, name: str) -> Iterator[Segment]:
    yield Segment(_MARKS.get(role, "<|im_system|>"), True)
    yield Segment(name)
    yield Segment("<|im_middle|>", True)


def _calls(calls: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    yield Segment("<|tool_calls_section_begin|>", True)
    for call in calls:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield Segment("<|tool_call_begin|>", True)
        yield Segment(call["id"])
        yield Segment("<|tool_call_argument_begin|>", True)
        yield Segment(arguments)
        yield Segment("<|tool_call_end|>", True)
    yield Segment("<|tool_calls_section_end|>", True)


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise ValueError(f"content of a {message['role']} message is not only text: {content!r}")
    return "".join(texts)
