"""Three domains in few words: tasks by construction, for models of a million parameters.

A whole dialogue has a few hundred characters. Level 1 is one call, level 2 two calls or a call
whose result is told, level 3 a call whose argument is an earlier call's result. Every task is an
``AgentTask`` with a plan and a rubric, as those that are synthesised; domains are ``compact.toml``.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from megatron_k2.agentic.records import Agent, AgentTask, Domain, Tool

LEVELS = (1, 2, 3)
NUM_RECORDS = 4
_MOST = 99  # of a number in a world or an order
_IDS = 60  # keys are a domain's prefix and a number up to this
_DONE = "ok"
Json = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A task with what it needs."""

    domain: Domain
    tools: tuple[Tool, ...]
    agent: Agent
    task: AgentTask


@dataclass
class _Draft:
    """A task while it is written: records by key, words, plan, state afterwards, told values."""

    world: dict[str, Json]
    ask: str = ""
    plan: list[Json] = field(default_factory=list)
    after: dict[str, Json] = field(default_factory=dict)
    tell: str = ""  # the last answer; {$result.N.path} in it
    facts: list[str] = field(default_factory=list)


def tasks(seed: int, levels: Sequence[int] = LEVELS, fault_share: float = 0.0) -> Iterator[Made]:
    """Yield tasks without end; the words of a later one may repeat those of an earlier one.

    Args:
        seed: the same one yields the same tasks.
        levels: of ``LEVELS``, in turn.
        fault_share: of tasks whose first call fails once and has to be made again.
    """
    rng = random.Random(f"compact {seed}")
    while True:
        for level in levels:
            domain, tools, agent = rng.choice(domains())
            kind = rng.choice(_KINDS[domain.name, level])
            yield _task(domain, tools, agent, level, kind, rng, fault_share)


@cache
def domains() -> tuple[tuple[Domain, tuple[Tool, ...], Agent], ...]:
    """Return the domains with their tools and agents."""
    text = resources.files(__package__).joinpath("compact.toml").read_text(encoding="utf-8")
    found = []
    for one in tomllib.loads(text)["domain"]:
        name = f"compact/{one['name']}"
        domain = Domain(name, "compact", one["description"], one["types"])
        tools = tuple(
            Tool(
                name,
                tool["name"],
                tool["description"],
                {
                    "type": "object",
                    "properties": {key: {"type": kind} for key, kind in tool["arguments"].items()},
                    "required": list(tool["arguments"]),
                },
                "compact",
                "evolved",
                tool["operation"],
            )
            for tool in one["tools"]
        )
        found.append((domain, tools, Agent(domain.name, "", tuple(tool.id for tool in tools))))
    return tuple(found)


def _task(
    domain: Domain,
    tools: tuple[Tool, ...],
    agent: Agent,
    level: int,
    kind: Callable[[_Draft, list[str], random.Random], None],
    rng: random.Random,
    fault_share: float,
) -> Made:
    (entity, type_) = next(iter(domain.types["entities"].items()))
    keys = [f"{type_['prefix']}{number}" for number in rng.sample(range(1, _IDS + 1), NUM_RECORDS)]
    world: dict[str, Json] = {key: {"id": key, "n": rng.randint(1, _MOST)} for key in keys}
    if domain.name == "compact/door":
        world = {key: {**record, "open": False} for key, record in world.items()}
    draft = _Draft(world)
    kind(draft, keys, rng)
    rubric = _rubric(entity, draft)
    faults: Json = {}
    if rng.random() < fault_share:
        faults = {"planted": [{"tool": draft.plan[0]["name"], "call": 0, "fault": "transient"}]}
    task = AgentTask(
        agent.id, level, {entity: draft.world}, {"style": "brief", "name": "user"}, draft.ask,
        draft.ask, tuple(rubric), tuple(draft.plan), faults, rng.randrange(2**31),
        {"solution": {"answer": draft.tell or _DONE}},
    )  # fmt: skip
    return Made(domain, tools, agent, task)


def _rubric(entity: str, draft: _Draft) -> list[Json]:
    """Return what has to hold: the state afterwards, the calls, what is told."""
    checks: list[tuple[str, str, Json]] = []
    for key, changes in draft.after.items():
        for name, value in changes.items():
            state = {"kind": "state", "entity": entity, "key": key, "field": name}
            checks.append(
                (
                    "success",
                    f"{name} of {key} is {value}",
                    {**state, "is": "equals", "value": value},
                )
            )
    spared = [[entity, key] for key in draft.after]
    unchanged = {"kind": "state", "unchanged": True, "except": spared}
    checks.append(("success", "nothing else is changed", unchanged))
    for step in draft.plan:
        arguments = {k: v for k, v in step["arguments"].items() if not str(v).startswith("$")}
        called = {"kind": "called", "tool": step["name"], "arguments": arguments}
        checks.append(("pattern", f"calls {step['name']}", called))
    if draft.facts:
        checks.append(("success", "tells it", {"kind": "answer", "contains": draft.facts}))
    return [
        {"name": f"c{at}", "text": text, "kind": kind, "check": check, "mandatory": True}
        for at, (kind, text, check) in enumerate(checks)
    ]


def _plus(draft: _Draft, keys: list[str], rng: random.Random, at: int = 0) -> str:
    key, name = keys[at], rng.choice(("add", "cut"))
    number = rng.randint(1, _MOST if name == "add" else draft.world[key]["n"])
    held = draft.world[key]["n"] + (number if name == "add" else -number)
    draft.after[key] = {"n": held}
    draft.plan.append({"name": name, "arguments": {"id": key, "n": number}})
    return f"add {number} to {key}" if name == "add" else f"cut {number} from {key}"


def _change(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    draft.ask = _plus(draft, keys, rng)


def _change_two(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    draft.ask = f"{_plus(draft, keys, rng)}, {_plus(draft, keys, rng, 1)}"


def _read(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    draft.ask = f"n of {keys[0]}?"
    draft.plan.append({"name": "get", "arguments": {"id": keys[0]}})
    draft.tell = "{$result.0.n}"
    draft.facts = [str(draft.world[keys[0]]["n"])]


def _add_held(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    one, other = keys[:2]
    draft.ask = f"add n of {one} to {other}"
    draft.plan.append({"name": "get", "arguments": {"id": one}})
    draft.plan.append({"name": "add", "arguments": {"id": other, "n": "$result.0.n"}})
    draft.after[other] = {"n": draft.world[one]["n"] + draft.world[other]["n"]}


def _pay(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    one, other = keys[:2]
    number = rng.randint(1, draft.world[one]["n"])
    draft.ask = f"pay {number} from {one} to {other}"
    draft.plan.append({"name": "pay", "arguments": {"a": one, "b": other, "n": number}})
    draft.after[one] = {"n": draft.world[one]["n"] - number}
    draft.after[other] = {"n": draft.world[other]["n"] + number}


def _pay_and_tell(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    _pay(draft, keys, rng)
    draft.ask += f", n of {keys[1]}?"
    draft.tell = "{$result.0.to.n}"
    draft.facts = [str(draft.after[keys[1]]["n"])]


def _pay_all(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    one, other = keys[:2]
    draft.ask = f"pay all from {one} to {other}"
    draft.plan.append({"name": "get", "arguments": {"id": one}})
    pay = {"a": one, "b": other, "n": "$result.0.n"}
    draft.plan.append({"name": "pay", "arguments": pay})
    total = draft.world[one]["n"] + draft.world[other]["n"]
    draft.after = {one: {"n": 0}, other: {"n": total}}


def _open(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    code = draft.world[keys[0]]["n"]
    draft.ask = f"open {keys[0]} with {code}"
    draft.plan.append({"name": "open", "arguments": {"id": keys[0], "n": code}})
    draft.after[keys[0]] = {"open": True}


def _open_found(draft: _Draft, keys: list[str], rng: random.Random) -> None:
    one, other = keys[:2]
    draft.world[other]["n"] = draft.world[one]["n"]
    draft.ask = f"open {other} with n of {one}"
    draft.plan.append({"name": "get", "arguments": {"id": one}})
    draft.plan.append({"name": "open", "arguments": {"id": other, "n": "$result.0.n"}})
    draft.after[other] = {"open": True}


_Kind = Callable[[_Draft, list[str], random.Random], None]
_KINDS: Mapping[tuple[str, int], tuple[_Kind, ...]] = {
    ("compact/stock", 1): (_change,),
    ("compact/stock", 2): (_change_two, _read),
    ("compact/stock", 3): (_add_held,),
    ("compact/bank", 1): (_pay,),
    ("compact/bank", 2): (_read, _pay_and_tell),
    ("compact/bank", 3): (_pay_all,),
    ("compact/door", 1): (_open,),
    ("compact/door", 2): (_read,),
    ("compact/door", 3): (_open_found,),
}
