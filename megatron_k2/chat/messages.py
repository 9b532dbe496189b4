"""OpenAI's and ShareGPT's dialogues as ours, with errors that name the place.

Ours are OpenAI's chat messages: ``role``, ``content``, ``tool_calls``, ``tool_call_id``, ``name``,
with ``reasoning_content``. Read as well: OpenAI's older ``function_call``, the role ``developer``
(a system message), bare tool declarations, and a fine-tuning ``weight`` of 0 or 1. ShareGPT is
``conversations`` of ``from`` and ``value`` as LLaMA-Factory writes them, with ``function_call`` and
``observation`` turns and ``tools`` as JSON text. Ids of calls are not renamed here
(``call_ids.rename_calls``). Left out: images and sound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    "system": "system",
    "function_call": "function_call",
    **dict.fromkeys(("observation", "tool", "function", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Dialogue:
    """Messages in OpenAI's form and the declarations of their tools."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def read_dialogue(row: Mapping[str, Any]) -> Dialogue:
    """Return a row of a data set as a dialogue: ``messages``, or ShareGPT's ``conversations``.

    Raises:
        ValueError: neither is there, or something in it is malformed.
    """
    if "messages" in row:
        return from_openai(row)
    if "conversations" in row:
        return from_sharegpt(row)
    keys = ", ".join(map(repr, row)) or "nothing"
    raise ValueError(f"a dialogue needs 'messages' or 'conversations'; the row has {keys}")


def from_openai(row: Mapping[str, Any]) -> Dialogue:
    """Return a dialogue in OpenAI's form: ``messages`` and perhaps ``tools`` or ``functions``.

    Raises:
        ValueError: something is malformed; the message begins with its place.
    """
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise ValueError(f"messages: a list of messages is needed, not {_kind(given)}")
    messages = [_openai_message(one, f"messages[{at}]") for at, one in enumerate(given)]
    tools = row.get("tools")
    return Dialogue(messages, read_tools(row.get("functions") if tools is None else tools))


def from_sharegpt(row: Mapping[str, Any]) -> Dialogue:
    """Return a ShareGPT row: ``conversations``, and perhaps ``system`` and ``tools``.

    Raises:
        ValueError: something is malformed; the message begins with its place.
    """
    given = row.get("conversations")
    if not isinstance(given, list) or not given:
        raise ValueError(f"conversations: a list of turns is needed, not {_kind(given)}")
    messages: list[dict[str, Any]] = []
    if system := row.get("system"):
        messages.append({"role": "system", "content": _text(system, "system")})
    for at, turn in enumerate(given):
        _add_turn(messages, turn, f"conversations[{at}]")
    return Dialogue(messages, read_tools(row.get("tools")))


def read_tools(given: Any) -> list[dict[str, Any]]:
    """Return declarations in OpenAI's form, from it, bare functions or JSON text of either.

    Raises:
        ValueError: a declaration is malformed.
    """
    if isinstance(given, str):
        given = _json(given, "tools") if given.strip() else []
    if given is None:
        return []
    if not isinstance(given, list):
        raise ValueError(f"tools: a list is needed, not {_kind(given)}")
    tools = []
    for at, tool in enumerate(given):
        where = f"tools[{at}]"
        if not isinstance(tool, Mapping):
            raise ValueError(f"{where}: a declaration is needed, not {_kind(tool)}")
        function = tool.get("function", None if "type" in tool else tool)
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise ValueError(f"{where}: a function is needed, not {dict(tool)!r}")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"{where}.function.name: a name is needed")
        whole = "function" in tool
        tools.append(dict(tool) if whole else {"type": "function", "function": dict(function)})
    return tools


def _openai_message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: a message is needed, not {_kind(given)}")
    role = given.get("role")
    role = {"developer": "system", "function": "tool"}.get(str(role), role)
    if role not in ROLES:
        raise ValueError(f"{where}.role: {role!r} is none of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role, "content": _content(given, where)}
    for key in ("name", "tool_call_id"):
        if given.get(key) is not None:
            message[key] = _text(given[key], f"{where}.{key}")
    reasoning = given.get("reasoning_content", given.get("reasoning"))
    if reasoning is not None:
        message["reasoning_content"] = _text(reasoning, f"{where}.reasoning_content")
    if (weight := given.get("weight")) is not None:
        if weight not in (0, 1):
            raise ValueError(f"{where}.weight: 0 or 1 is needed, not {weight!r}")
        message["weight"] = int(weight)
    calls = given.get("tool_calls")
    if given.get("function_call") is not None:
        calls = [{"function": given["function_call"]}]
    if calls:
        if role != "assistant":
            raise ValueError(f"{where}.tool_calls: only an assistant calls tools, not {role}")
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if message["content"] is None and not calls:
        if role != "assistant" or reasoning is None:
            raise ValueError(f"{where}.content: a text is needed")
        message["content"] = ""
    return message


def _content(given: Mapping[str, Any], where: str) -> str | None:
    content = given.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}.content: a text is needed, not {_kind(content)}")
    texts = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise ValueError(f"{where}.content[{at}]: only texts are read, not {kind!r}")
        texts.append(text)
    return "".join(texts)


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        raise ValueError(f"{where}: a list is needed, not {_kind(given)}")
    calls = []
    for at, call in enumerate(given):
        place = f"{where}[{at}].function"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ValueError(f"{place}: name and arguments are needed, not {_kind(call)}")
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise ValueError(f"{place}.name: a name is needed, not {name!r}")
        if not isinstance(arguments, str | Mapping):
            kind = _kind(arguments)
            raise ValueError(f"{place}.arguments: JSON text or an object is needed, not {kind}")
        found: dict[str, Any] = {
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        if call.get("id") is not None:
            found["id"] = _text(call["id"], f"{where}[{at}].id")
        calls.append(found)
    return calls


def _add_turn(messages: list[dict[str, Any]], turn: Any, where: str) -> None:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: a turn is needed, not {_kind(turn)}")
    speaker = turn.get("from")
    role = _SHAREGPT_ROLES.get(str(speaker))
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise ValueError(f"{where}.from: {speaker!r} is none of {known}")
    value = turn.get("value")
    if role != "function_call":
        messages.append({"role": role, "content": _text(value, f"{where}.value")})
        return
    if isinstance(value, str):
        value = _json(value, f"{where}.value")
    calls = _calls(value if isinstance(value, list) else [value], f"{where}.value")
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and "tool_calls" not in last:
        last["tool_calls"] = calls  # what it said before it called
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: a text is needed, not {_kind(value)}")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}): {text[:60]!r}") from error


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
