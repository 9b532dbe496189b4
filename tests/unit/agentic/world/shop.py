"""A shop with an operation of each kind, the same shop written out in Python, and random calls."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from megatron_k2.agentic.records import Domain, Tool

Json = dict[str, Any]
TYPES: Json = {
    "entities": {
        "customer": {
            "key": "id",
            "prefix": "c",
            "fields": {
                "id": {"type": "string"},
                "name": {"type": "string", "maxLength": 8},
                "credit": {"type": "number", "minimum": 0, "default": 0},
            },
        },
        "order": {
            "key": "id",
            "prefix": "o",
            "fields": {
                "id": {"type": "string"},
                "customer": {"ref": "customer"},
                "total": {"type": "integer", "minimum": 0, "maximum": 50},
                "status": {"enum": ["open", "closed"], "default": "open"},
                "note": {"type": ["string", "null"]},
                "tags": {"type": "array", "items": {"type": "string"}, "default": []},
            },
        },
    }
}
DOMAIN = Domain("shop", "software_apps", "A shop.", TYPES)
WORLD: Json = {
    "customer": {
        "c1": {"id": "c1", "name": "Ann", "credit": 20},
        "c2": {"id": "c2", "name": "Bo", "credit": 0.5},
        "c3": {"id": "c3", "name": "Cy", "credit": 7},
    },
    "order": {
        "o1": {"id": "o1", "customer": "c1", "total": 5, "status": "open", "note": None,
               "tags": []},
        "o2": {"id": "o2", "customer": "c1", "total": 9, "status": "closed", "note": "x",
               "tags": ["a"]},
    },
}  # fmt: skip
_OPEN = {"field": "status", "is": "equals", "value": "open"}
_S, _I, _N = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_MANY = {"type": "array", "items": _S}
_TOOLS: dict[str, tuple[Json, list[str], Json]] = {
    "get": ({"id": _S}, ["id"], {"do": "get", "entity": "order", "key": "$id"}),
    "list": (
        {"status": _S, "limit": _I, "after": _S},
        [],
        {"do": "list", "entity": "order", "limit": "$limit", "cursor": "$after",
         "where": [{"field": "status", "is": "equals", "value": "$status"}]},
    ),
    "create": (
        {"customer": _S, "total": _I, "note": _S},
        ["customer", "total"],
        {"do": "create", "entity": "order",
         "set": {"customer": "$customer", "total": "$total", "note": "$note"}},
    ),
    "update": (
        {"id": _S, "total": _I, "note": _S},
        ["id"],
        {"do": "update", "entity": "order", "key": "$id", "require": [_OPEN],
         "set": {"total": "$total", "note": "$note"}},
    ),
    "raise": (
        {"id": _S, "by": _I},
        ["id", "by"],
        {"do": "update", "entity": "order", "key": "$id", "set": {"total": {"plus": "$by"}}},
    ),
    "delete": ({"id": _S}, ["id"], {"do": "delete", "entity": "order", "key": "$id"}),
    "leave": ({"id": _S}, ["id"], {"do": "delete", "entity": "customer", "key": "$id"}),
    "pay": (
        {"a": _S, "b": _S, "n": _N},
        ["a", "b", "n"],
        {"do": "transfer", "entity": "customer", "from": "$a", "to": "$b", "field": "credit",
         "amount": "$n"},
    ),
    "tag": (
        {"id": _S, "tag": _S},
        ["id", "tag"],
        {"do": "update", "entity": "order", "key": "$id", "set": {"tags": {"append": "$tag"}}},
    ),
    "untag": (
        {"id": _S, "tag": _S},
        ["id", "tag"],
        {"do": "update", "entity": "order", "key": "$id", "set": {"tags": {"remove": "$tag"}}},
    ),
    "close": (
        {"ids": _MANY},
        ["ids"],
        {"do": "batch", "over": "$ids",
         "each": {"do": "update", "entity": "order", "key": "$item", "require": [_OPEN],
                  "set": {"status": "closed"}}},
    ),
    "join": (
        {"name": _S, "total": _I},
        ["name", "total"],
        {"do": "steps", "each": [
            {"do": "create", "entity": "customer", "set": {"name": "$name"}},
            {"do": "create", "entity": "order",
             "set": {"customer": "$step.0.id", "total": "$total"}}]},
    ),
    "sum": (
        {"customer": _S},
        ["customer"],
        {"do": "sum", "entity": "order", "field": "total",
         "where": [{"field": "customer", "is": "equals", "value": "$customer"}]},
    ),
    "count": ({}, [], {"do": "count", "entity": "order"}),
}  # fmt: skip
TOOLS = tuple(
    Tool(
        "shop",
        name,
        "A tool.",
        {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        },
        "software_apps",
        "evolved",
        operation,
    )
    for name, (properties, required, operation) in _TOOLS.items()
)


def random_call(rng: random.Random) -> tuple[str, Any]:
    """Return a call: most are valid, of records that may be there; some are nonsense."""
    name = rng.choice(list(_TOOLS)) if rng.random() < 0.97 else "nothing"
    if name == "nothing" or rng.random() < 0.08:
        wrong = [{"id": 3}, {}, {"id": "o1", "more": 1}, "{", "[]", None, {"total": float("nan")}]
        return name, rng.choice(wrong)
    properties, required, _ = _TOOLS[name]
    given = {
        key: _value(key, schema, rng)
        for key, schema in properties.items()
        if key in required or rng.random() < 0.5
    }
    return name, given


def _value(key: str, schema: Json, rng: random.Random) -> Any:
    order, customer = f"o{rng.randint(1, 5)}", f"c{rng.randint(1, 5)}"
    if key == "ids":
        return [f"o{rng.randint(1, 5)}" for _ in range(rng.randint(0, 3))]
    if schema == _I:
        return rng.choice((rng.randint(-3, 55), rng.randint(1, 9), 10**400))
    if schema == _N:
        return rng.choice((0.1, 0.2, 3, 25, -1, 0))
    if key in ("customer", "a", "b"):
        return customer
    if key == "id":
        return rng.choice((order, order, customer))
    if key == "after":
        return order
    return rng.choice(("a", "b", "open", "closed", "$id", "too long a name", "ä"))


def copied(world: Json) -> Json:
    """Return a copy of a world; a third of the time of ``copy.deepcopy``."""
    return {
        entity: {
            key: {name: list(v) if isinstance(v, list) else v for name, v in record.items()}
            for key, record in table.items()
        }
        for entity, table in world.items()
    }


class Shop:
    """The shop in plain Python: every call works on a copy, which is kept if all went well."""

    def __init__(self) -> None:
        self.world = copied(WORLD)
        self.last = {"customer": 3, "order": 2}

    def call(self, name: str, given: Mapping[str, Any]) -> tuple[str, Any]:
        """Return outcome and result of a valid call."""
        if name == "close":
            return self._close(given["ids"])
        before, last = copied(self.world), dict(self.last)
        try:
            return "ok", getattr(self, f"_{name}")(**given)
        except (KeyError, AssertionError):
            self.world, self.last = before, last
            return "refused", None

    def _close(self, ids: list[str]) -> tuple[str, Any]:
        orders, good = self.world["order"], []
        for id_ in ids:
            good.append(id_ in orders and orders[id_]["status"] == "open")
            if good[-1]:
                orders[id_]["status"] = "closed"
        bad = good.count(False)
        return "ok" if not bad else "refused" if bad == len(ids) else "partial", good

    def _get(self, id: str) -> Json:
        return self.world["order"][id]

    def _list(self, status: str = "", limit: int = 20, after: str = "") -> Json:
        orders = sorted(self.world["order"].values(), key=lambda one: int(one["id"][1:]))
        found = [one for one in orders if not status or one["status"] == status]
        keys = [one["id"] for one in found]
        start = keys.index(after) + 1 if after in keys else 0
        assert not after or after in keys
        assert 1 <= limit < 2**53
        shown = found[start : start + limit]
        more = {"next": shown[-1]["id"]} if start + limit < len(found) else {}
        return {"items": shown, "total": len(found), **more}

    def _make(self, entity: str, record: Json) -> Json:
        self.last[entity] += 1
        key = f"{entity[0]}{self.last[entity]}"
        self.world[entity][key] = {"id": key, **record}
        return self.world[entity][key]

    def _create(self, customer: str, total: int, note: str | None = None) -> Json:
        assert customer in self.world["customer"] and 0 <= total <= 50
        return self._make("order", {"customer": customer, "total": total, "status": "open",
                                    "note": note, "tags": []})  # fmt: skip

    def _update(self, id: str, **values: Any) -> Json:
        order = self.world["order"][id]
        assert order["status"] == "open" and 0 <= values.get("total", 0) <= 50
        order.update(values)
        return order

    def _raise(self, id: str, by: int) -> Json:
        order = self.world["order"][id]
        assert 0 <= order["total"] + by <= 50
        order["total"] += by
        return order

    def _delete(self, id: str) -> Json:
        del self.world["order"][id]
        return {"deleted": id}

    def _leave(self, id: str) -> Json:
        assert all(one["customer"] != id for one in self.world["order"].values())
        del self.world["customer"][id]
        return {"deleted": id}

    def _pay(self, a: str, b: str, n: float) -> Json:
        source, target = self.world["customer"][a], self.world["customer"][b]
        assert a != b and 0 < n <= source["credit"]
        source["credit"] = round(source["credit"] - n, 6)
        target["credit"] = round(target["credit"] + n, 6)
        return {"from": source, "to": target}

    def _tag(self, id: str, tag: str) -> Json:
        self.world["order"][id]["tags"].append(tag)
        return self.world["order"][id]

    def _untag(self, id: str, tag: str) -> Json:
        order = self.world["order"][id]
        assert tag in order["tags"]
        order["tags"] = [one for one in order["tags"] if one != tag]
        return order

    def _join(self, name: str, total: int) -> Json:
        assert len(name) <= 8
        made = self._make("customer", {"name": name, "credit": 0})
        return {"results": [made, self._create(made["id"], total)]}

    def _sum(self, customer: str) -> Json:
        orders = self.world["order"].values()
        return {"sum": sum(one["total"] for one in orders if one["customer"] == customer)}

    def _count(self) -> Json:
        return {"count": len(self.world["order"])}
