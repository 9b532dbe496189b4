"""How a script asks for calls and reports them, from the templates of ``words.toml``.

Values of results are told as ``{$result.N.path}``, which the policy replaces by what it read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from megatron_k2.agentic.tasks.argument_uses import uses_of
from megatron_k2.agentic.tasks.asking import data
from megatron_k2.agentic.tasks.references import said
from megatron_k2.agentic.tasks.scripted_intents import Intent
from megatron_k2.data.rephrase.prompts import fill

COMPARED = {
    "equals": "is", "not": "is not", "at_least": "is at least", "at_most": "is at most",
    "above": "is above", "below": "is below", "in": "is one of", "contains": "contains",
}  # fmt: skip
_SIGNS = re.compile(r"[_\-\s]+")


def spoken(name: str) -> str:
    """Return a name of code as words."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return _SIGNS.sub(" ", parts).strip().lower()


class Speaker:
    """Words from one generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._words = data("words")

    def pick(self, group: str, name: str, /, **slots: str) -> str:
        """Return a template of a group, filled."""
        return fill(self._rng.choice(self._words[group][name]), slots)

    def request(
        self,
        intent: Intent,
        hidden: Sequence[str] = (),
        named: Mapping[str, str] | None = None,
        field: str = "",
    ) -> str:
        """Return what a user asks, an imperative without a full stop.

        Args:
            intent: what is wanted.
            hidden: arguments that the user does not tell.
            named: words for arguments whose value the user does not know.
            field: that is wanted of a record, or added up.
        """
        operation, do = intent.operation, intent.operation["do"]
        named = named or {}
        key = intent.key_argument
        told = {
            name: named.get(name, said(value))
            for name, value in intent.arguments.items()
            if name not in hidden and not (key and name == key[0])
        }
        slots = {
            "entity": spoken(operation.get("entity", "")),
            "key": "",
            "field": spoken(field or operation.get("field", "")),
            "tool": spoken(intent.tool.name),
            "arguments": " and ".join(f"{spoken(name)} {value}" for name, value in told.items()),
            "where": self._where(intent, hidden, named),
        }
        if key is not None:
            slots["key"] = said(intent.arguments[key[0]])
            if key[0] in hidden:
                slots |= {"entity": f"a certain {slots['entity']}", "key": ""}
            elif key[0] in named:
                slots |= {"entity": "", "key": named[key[0]]}
        kind = do if do in self._words["ask"] else "other"
        if kind == "update" and not told:
            kind = "bare"
        if kind == "other" and not told:
            return f"use {slots['tool']}"
        if kind == "create" and not told:
            return f"create a new {slots['entity']}"
        words = self.pick("ask", kind, **slots)
        extra = {} if kind in ("update", "create", "other") else self._beside(intent, told)
        if extra:
            words += " (" + ", ".join(f"{spoken(k)} {v}" for k, v in extra.items()) + ")"
        return " ".join(words.split())

    def _beside(self, intent: Intent, told: Mapping[str, str]) -> dict[str, str]:
        """Return told arguments that a template has no place for."""
        where = {use.name for use in uses_of(intent.operation) if use.role == "where"}
        return {name: value for name, value in told.items() if name not in where}

    def _where(self, intent: Intent, hidden: Sequence[str], named: Mapping[str, str]) -> str:
        parts = []
        for one in intent.operation.get("where", ()):
            value = one["value"]
            if isinstance(value, str) and value.startswith("$"):
                name = value[1:]
                if name not in intent.arguments or name in hidden:
                    continue
                value = named.get(name, said(intent.arguments[name]))
            parts.append(f"{spoken(one['field'])} {COMPARED[one['is']]} {said(value)}")
        return "where " + " and ".join(parts) if parts else "on record"

    def report(self, intent: Intent, index: int, field: str = "") -> str:
        """Return what the last answer says of a call that worked; ``index``: in the plan."""
        do = intent.operation["do"]
        slots = {
            "entity": spoken(intent.operation.get("entity", "")),
            "tool": spoken(intent.tool.name),
            "field": spoken(field or intent.operation.get("field", "")),
        }
        if do == "get":
            assert intent.key_argument is not None or field
            slots |= {"key": self._key(intent, index), "value": f"{{$result.{index}.{field}}}"}
            return self.pick("tell", "field", **slots)
        if do in ("list", "count"):
            path = "total" if do == "list" else "count"
            return self.pick("tell", "number", **slots, value=f"{{$result.{index}.{path}}}")
        if do == "sum":
            return self.pick("tell", "sum", **slots, value=f"{{$result.{index}.sum}}")
        if do == "create":
            key = created_key(intent)
            return self.pick("tell", "created", **slots, value=f"{{$result.{index}.{key}}}")
        if intent.key_argument is not None:
            return self.pick("tell", "done", **slots, key=self._key(intent, index))
        return self.pick("tell", "plain", **slots)

    def _key(self, intent: Intent, index: int) -> str:
        key = intent.key_argument
        return said(intent.arguments[key[0]]) if key else "it"


def created_key(intent: Intent) -> str:
    """Return the name of the key field of what a ``create`` made."""
    entity = intent.operation["entity"]
    made = [key for key in intent.after[entity] if key not in intent.before[entity]]
    record = intent.after[entity][made[0]]
    return next(name for name, value in record.items() if value == made[0])
