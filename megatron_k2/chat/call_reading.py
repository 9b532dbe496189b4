"""Tool calls of one answer while it is read: ids, names, arguments, and what is wrong with them.

A call's id is kept as the model wrote it, so that the message renders to what was read; the next
prompt renames it (``call_ids.rename_calls``). Arguments are checked to be a JSON object when the
call ends; ``schema.py`` checks them against the declarations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_k2.chat.call_ids import PREFIX, call_id, read_id
from megatron_k2.chat.format import CallArguments, CallBegin, Tools

SHOWN = 40  # characters of a text that a problem quotes


@dataclass
class Call:
    """A tool call."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class CallReading:
    """Calls, one after the other."""

    def __init__(self, num_before: int, tools: Tools | None, report: Callable[[str], None]) -> None:
        """Start an answer.

        Args:
            num_before: calls in the dialogue so far.
            tools: declarations; without any, every name will do.
            report: takes a problem.
        """
        self._num_before = num_before
        self._names = {declared_name(tool) for tool in tools or ()}
        self._report = report
        self._calls: list[Call] = []
        self.is_open = False

    def begin(self, text: str) -> CallBegin | None:
        """Start the call of this id; None, and a problem, where the id has no name."""
        found = read_id(text.strip())
        if found is None:
            self._report(f"{quoted(text)} is no id of the form functions.NAME:INDEX")
            return None
        name = found[0]
        call = Call(text.strip(), name)
        expected = call_id(name, self._num_before + len(self._calls))
        if call.id != text:
            self._report(f"white space around the id {quoted(text)}")
        if not call.id.startswith(PREFIX):
            self._report(f"id {quoted(call.id)} lacks {PREFIX!r}")
        elif call.id != expected:
            self._report(f"id {quoted(call.id)} should be {quoted(expected)}, by count of calls")
        if self._names and name not in self._names:
            known = ", ".join(sorted(map(str, self._names)))
            self._report(f"id {quoted(call.id)} calls a tool that is not declared; known: {known}")
        self._calls.append(call)
        self.is_open = True
        return CallBegin(len(self._calls) - 1, call.id, name)

    def more(self, text: str) -> CallArguments:
        """Append to the arguments of the open call."""
        self._calls[-1].arguments.append(text)
        return CallArguments(len(self._calls) - 1, text)

    def end(self, reason: str | None = None) -> None:
        """Close the open call.

        Args:
            reason: why it was not the call that ended.
        """
        call = self._calls[-1]
        self.is_open = False
        if reason is not None:
            self._report(f"tool call {quoted(call.id)} does not end: {reason}")
        elif wrong := wrong_arguments("".join(call.arguments)):
            self._report(f"arguments of {quoted(call.id)} {wrong}")

    def message(self) -> list[dict[str, Any]]:
        """Return the calls in OpenAI's form."""
        return [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.arguments)},
            }
            for call in self._calls
        ]


def wrong_arguments(text: str) -> str | None:
    """Return what is wrong with the text of arguments, None if it is a JSON object."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=str)
    except json.JSONDecodeError as error:
        first = max(0, error.pos - SHOWN // 2)
        near = text[first : error.pos + SHOWN // 2]
        return f"are no JSON: {error.msg} at character {error.pos} of {len(text)}, near {near!r}"
    except RecursionError:
        return "are no JSON that can be read: nested too deeply"
    except ValueError as error:
        return f"are no JSON: {error}"
    if not isinstance(value, dict):
        return f"are no JSON object but {type(value).__name__}"
    return None


def declared_name(tool: Mapping[str, Any]) -> Any:
    """Return the name of a declaration in OpenAI's form, None without one."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def quoted(text: str) -> str:
    """Return a text as a problem shows it."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")
