"""What goes wrong besides the world's refusals: seeded, planted, and never silent.

A call's fault follows from the task's seed and the number of the call, so the same dialogue meets
the same faults. None of them lies: a call that failed or timed out changed nothing and says so (a
timeout is before the change is made, never after), a truncated list says how to go on, a
batch says which elements failed, and what is read is never stale. Latency is simulated seconds;
nothing sleeps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.records import Outcome, Tool
from megatron_k2.agentic.world.fields import kind_of

FAULTS = ("rate_limit", "timeout", "transient", "empty", "partial", "truncated")
"""``empty`` is a reading call's answer without a body; ``partial`` needs a batch, ``truncated`` a
list with a ``cursor``. Where a fault does not fit the call, the call goes well."""
FAILING = ("rate_limit", "timeout", "transient", "empty")
_READING = ("get", "list", "sum", "count")
_TIMEOUT_S = 30.0
_MEDIAN_S, _SPREAD = 0.4, 0.6  # of a log-normal: a web service that is not far away
_QUICK_S = 0.05  # an answer that no store was asked for
_TRANSIENT = ("503 service unavailable", "connection reset by the server", "500 internal error")
_KNOWN = {"rates", "planted", "latency", "timeout_s", "most_in_row"}


@dataclass(frozen=True)
class Drawn:
    """What a call meets.

    Attributes:
        fault: of ``FAULTS``, "" for none.
        latency_s: simulated.
        share: in [0, 1), what a partial or truncated answer takes its measure from.
        words: for the model, where the call fails; "" is an answer without a body.
    """

    fault: str
    latency_s: float
    share: float = 0.0
    words: str = ""

    @property
    def outcome(self) -> Outcome:
        """Of a call that fails by it."""
        return "timeout" if self.fault == "timeout" else "failed"


def check_faults(faults: Any, tools: Sequence[Tool] = ()) -> list[str]:
    """Return what is wrong with a task's ``faults``, a reason each.

    Args:
        faults: ``{"rates": {FAULT: SHARE}, "planted": [{"tool", "call", "fault"}], "latency":
            {"median_s", "spread"}, "timeout_s", "most_in_row"}``, each part optional; ``call``
            counts the valid calls of the tool from 0.
        tools: that planted faults may name; none: any.
    """
    if not isinstance(faults, Mapping):
        return ["faults are no object"]
    found = [f"faults have unknown {name!r}" for name in sorted(set(faults) - _KNOWN)]
    rates, latency = faults.get("rates", {}), faults.get("latency", {})
    if not isinstance(rates, Mapping) or not isinstance(latency, Mapping):
        return [*found, "'rates' and 'latency' are objects"]
    found += [f"fault {one!r} is none of {', '.join(FAULTS)}" for one in rates if one not in FAULTS]
    others = [faults[name] for name in ("timeout_s", "most_in_row") if name in faults]
    numbers = [*rates.values(), *latency.values(), *others]
    if any(kind_of(one) not in ("integer", "number") or one < 0 for one in numbers):
        found.append("a rate, a time or a number is none, or below 0")
    elif sum(rates.values()) > 1:
        found.append("rates must add up to at most 1")
    operations = {tool.name: tool.operation for tool in tools}
    for one in faults.get("planted", ()):
        if not isinstance(one, Mapping) or set(one) != {"tool", "call", "fault"}:
            found.append(f"planted {one!r} must have tool, call and fault")
        elif one["fault"] not in FAULTS or type(one["call"]) is not int or one["call"] < 0:
            found.append(f"planted {dict(one)!r} has an unknown fault or a wrong call")
        elif tools and one["tool"] not in operations:
            found.append(f"planted {dict(one)!r}: there is no such tool")
        elif tools and not fits(one["fault"], operations[one["tool"]]):
            found.append(f"planted {dict(one)!r}: no fault of such a tool")
    return found


def fits(fault: str, operation: Mapping[str, Any] | None) -> bool:
    """Return whether a tool with this operation can meet a fault."""
    do = operation.get("do") if operation else None
    if fault == "empty":
        return do in _READING
    if fault == "partial":
        return do == "batch"
    if fault == "truncated":
        return operation is not None and do == "list" and "cursor" in operation
    return fault in FAILING


class FaultPlan:
    """The faults of one dialogue: asked once a valid call, in order."""

    def __init__(self, faults: Mapping[str, Any], seed: int) -> None:
        """Keep a task's ``faults``, checked by ``check_faults``, and its seed."""
        latency = faults.get("latency", {})
        self._rates: Mapping[str, float] = faults.get("rates", {})
        self._planted = {
            (one["tool"], one["call"]): one["fault"] for one in faults.get("planted", ())
        }
        self._median_s = latency.get("median_s", _MEDIAN_S)
        self._spread = latency.get("spread", _SPREAD)
        self._timeout_s = float(faults.get("timeout_s", _TIMEOUT_S))
        self._most_in_row = faults.get("most_in_row", 2)
        self._seed = seed
        self._calls = 0
        self._of_tool: dict[str, int] = {}
        self._in_row = 0

    def draw(self, tool: Tool) -> Drawn:
        """Return what the next valid call meets; after ``most_in_row`` failures drawn, none."""
        rng = random.Random(f"fault {self._seed} {self._calls}")
        nth = self._of_tool.get(tool.name, 0)
        self._calls += 1
        self._of_tool[tool.name] = nth + 1
        chance, share, choice = rng.random(), rng.random(), rng.random()
        latency_s = round(self._median_s * rng.lognormvariate(0, self._spread), 3)
        fault = self._planted.get((tool.name, nth), "")
        if not fault:
            fault = self._by_chance(chance, tool)
            self._in_row = self._in_row + 1 if fault in FAILING else 0
        if fault not in FAILING:
            return Drawn(fault, latency_s, share)
        if fault == "empty":
            return Drawn(fault, latency_s)
        if fault == "rate_limit":
            words = f"429 too many requests; nothing was done; try again in {1 + int(9 * choice)} s"
            return Drawn(fault, _QUICK_S, words=failure(fault, words))
        if fault == "timeout":
            words = f"no answer within {self._timeout_s:g} s; nothing was changed"
            return Drawn(fault, self._timeout_s, words=failure(fault, words))
        words = f"{_TRANSIENT[int(len(_TRANSIENT) * choice)]}; nothing was changed"
        return Drawn(fault, latency_s, words=failure(fault, words))

    def _by_chance(self, chance: float, tool: Tool) -> str:
        for name in FAULTS:  # not the order of the record, which JSON does not keep
            rate = self._rates.get(name, 0.0)
            if chance < rate:
                held_back = name in FAILING and self._in_row >= self._most_in_row
                return name if fits(name, tool.operation) and not held_back else ""
            chance -= rate
        return ""


def failure(kind: str, message: str, retry: bool = True) -> str:
    """Return the words of a call that did not succeed, JSON."""
    error = {"type": kind, "message": message, "retry": retry}
    return words({"error": error})


def words(value: Any) -> str:
    """Return a result as the model reads it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
