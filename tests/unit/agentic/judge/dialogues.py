"""A small world, a task on it, and trajectories written out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_k2.agentic.records import AgentTask, Call, Tool, Trajectory

TYPES = {
    "entities": {
        "order": {
            "key": "order_id",
            "fields": {
                "order_id": {"type": "string"},
                "state": {"type": "string", "enum": ["open", "cancelled"]},
                "total": {"type": "number"},
            },
        }
    }
}
BEFORE = {
    "order": {
        "order-7": {"order_id": "order-7", "state": "open", "total": 1234.5},
        "order-8": {"order_id": "order-8", "state": "open", "total": 20},
    }
}
AFTER = {
    "order": {**BEFORE["order"], "order-7": {**BEFORE["order"]["order-7"], "state": "cancelled"}}
}
KEY = {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]}
TOOLS = tuple(
    Tool("shop", name, f"{name} of the shop", KEY, "website_control", "evolved")
    for name in ("get_order", "cancel_order", "refund_order")
)


def task(*rubric: Mapping[str, Any]) -> AgentTask:
    return AgentTask(
        "agent", 3, BEFORE, {"style": "brief", "name": "Ana"},
        "Order order-7 is to be cancelled; tell its total.", "Please cancel order-7.", rubric,
    )  # fmt: skip


def criterion(check: Mapping[str, Any] | None, **other: Any) -> dict[str, Any]:
    return {"name": "it", "text": "It holds.", "kind": "success", "check": check, **other}


class Script:
    """Writes a trajectory turn by turn."""

    def __init__(self, opening: str = "Please cancel order-7.") -> None:
        self.messages: list[dict[str, Any]] = [
            {"role": "system", "content": "You help the customers of a shop."},
            {"role": "user", "content": opening},
        ]
        self.calls: list[dict[str, Any]] = []

    def call(
        self,
        name: str,
        arguments: Any,
        result: Any = None,
        outcome: str = "ok",
        writes: bool = False,
    ) -> Script:
        """An assistant's call and its result; arguments as text are no JSON."""
        number = len(self.calls)
        given = arguments if isinstance(arguments, str) else json.dumps(arguments)
        content = json.dumps(result if result is not None else {"error": {"type": outcome}})
        function = {"name": name, "arguments": given}
        one = {"id": f"functions.{name}:{number}", "type": "function", "function": function}
        call = Call(
            len(self.messages), one["id"], name, None if isinstance(arguments, str) else arguments,
            outcome, content, before="a", after="b" if writes else "a",
        )  # fmt: skip
        self.calls.append(call.__dict__)
        self.messages += [
            {"role": "assistant", "content": "", "tool_calls": [one]},
            {"role": "tool", "tool_call_id": one["id"], "content": content},
        ]
        return self

    def say(self, text: str) -> Script:
        self.messages.append({"role": "assistant", "content": text})
        return self

    def user(self, text: str) -> Script:
        self.messages.append({"role": "user", "content": text})
        return self

    def done(
        self, of: AgentTask, world: Any = AFTER, ending: str = "finished", **other: Any
    ) -> Trajectory:
        tools = tuple(tool.declaration for tool in TOOLS)
        made = Trajectory(
            of.id,
            0,
            tuple(self.messages),
            tools,
            tuple(self.calls),
            world,
            ending,
            model="scripted",
        )
        return replace(made, **other)


def good() -> Script:
    """The order is looked up, cancelled and reported."""
    return (
        Script()
        .call("get_order", {"order_id": "order-7"}, BEFORE["order"]["order-7"])
        .call("cancel_order", {"order_id": "order-7"}, AFTER["order"]["order-7"], writes=True)
        .say("I have cancelled order-7; its total was 1,234.50.")
    )


def names(problems: Sequence[str]) -> str:
    return "\n".join(problems)
