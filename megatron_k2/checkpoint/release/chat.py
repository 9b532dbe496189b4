"""The chat template: its marks, and what it makes of three dialogues, beside our own rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_k2.chat.release_template import (
    TEMPLATE_FILE,
    read_template,
    render_template,
    sorted_keys,
)
from megatron_k2.chat.special_tokens import CONFIG_FILE, read_config
from megatron_k2.chat.template import KIMI_K2, render
from megatron_k2.checkpoint.release.check import DIFFERS, Check, absent, compare, none_of

AREA = "chat template"
MARKS = (
    "<|im_system|>tool_declare<|im_middle|>",
    KIMI_K2.default_system,
    "<|im_user|>",
    "<|im_assistant|>",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "## Return of ",
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, é.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_USER = {"role": "user", "content": "What is the weather in Beijing?"}
_CALLS = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [
        {
            "id": f"functions.get_weather:{index}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": arguments},
        }
        for index, arguments in enumerate(('{"city": "Beijing"}', {"city": "Zürich"}))
    ],
}
_RESULTS = [
    {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": '{"sun": true}'},
    {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "functions.get_weather:1",
        "content": "rain",
    },
]
DIALOGUES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "a question": ([_USER], None),
    "a system message and a question": ([{"role": "system", "content": "Be brief."}, _USER], None),
    "two tool calls with results": (
        [{"role": "system", "content": "Be brief."}, _USER, _CALLS, *_RESULTS],
        [_TOOL],
    ),
}
_AROUND = 24  # characters shown on each side of the first difference


def check_chat(folder: Path) -> Iterator[Check]:
    """Yield the checks of the chat template."""
    try:
        config = read_config(folder / CONFIG_FILE)
        template = read_template(folder, config)
    except (OSError, ValueError) as error:
        yield Check(AREA, "readable", "a template", str(error), DIFFERS)
        return
    if template is None:
        what = f"neither {TEMPLATE_FILE} nor chat_template in {CONFIG_FILE}"
        yield absent(AREA, "marks and dialogues", "the rules of megatron_k2.chat.template", what)
        return
    inside = config.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file() and inside is not None:
        same = "equal" if inside == template else "not equal"
        yield compare(AREA, f"{TEMPLATE_FILE} and {CONFIG_FILE}", "equal", same)
    lost = [repr(mark) for mark in MARKS if mark not in template]
    yield none_of(AREA, "marks that are not in it", lost, limit=10)
    for name, (messages, tools) in DIALOGUES.items():
        yield _rendered(template, name, messages, tools)


def _rendered(
    template: str,
    name: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> Check:
    ours = render(messages, tools, add_generation_prompt=True)
    name = f"text of {name}"
    try:
        theirs = render_template(
            template, messages, tools=sorted_keys(tools), add_generation_prompt=True
        )
    except ImportError as error:
        return absent(AREA, name, "rendered in jinja2's sandbox", f"jinja2 ({error})")
    except ValueError as error:
        return Check(AREA, name, ours, str(error), DIFFERS)
    if theirs == ours:
        return compare(AREA, name, f"{len(ours)} characters", f"{len(theirs)} characters")
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    first, last = max(0, at - _AROUND), at + _AROUND
    note = f"first difference at character {at}"
    return compare(AREA, name, ours[first:last], theirs[first:last], note)
