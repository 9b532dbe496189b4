"""What passes between the stages of agentic synthesis, as lines of JSON.

Domains and their tools -> agents -> tasks with rubrics -> trajectories -> judgements (Kimi K2,
arXiv 2507.20534, section 3.1.1). Every record is frozen, made of JSON values alone, and names what
it was made from by id, so that a kept trajectory can be followed back to its tools. An id is the
hash of a record's content: the same content has the same id on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from megatron_k2.chat.format import Message

Source = Literal["dump", "live", "evolved"]
Outcome = Literal["ok", "partial", "invalid", "refused", "failed", "timeout"]
Ending = Literal["finished", "user", "turns", "context", "failed"]
ID_DIGITS = 16  # of a SHA-256 in hexadecimal: 64 bits, for at most millions of records


def content_id(value: Any) -> str:
    """Return the hash of a JSON value; keys in any order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]


@dataclass(frozen=True)
class Record:
    """A line of a stage's file."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json[T: Record](cls: type[T], value: Mapping[str, Any]) -> T:
        """Return the record of a line.

        Raises:
            ValueError: fields are missing or unknown.
        """
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"no {cls.__name__}: {error}") from error

    @property
    def id(self) -> str:
        """Hash of its content."""
        return content_id([type(self).__name__, self.to_json()])


@dataclass(frozen=True)
class Tool(Record):
    """A tool that a model may call.

    Attributes:
        server: what offers it: an MCP server, or the id of a domain.
        name: as the model calls it; letters, digits, ``_`` and ``-``, at most 64.
        description: for the model.
        parameters: JSON Schema of type object.
        category: of the server; one of the 17 published ones for evolved tools.
        source: a dump of descriptions, a live MCP server, or evolution.
        operation: what it does to its domain's world (``world/README.md``); None: only a real
            server, or a model that simulates, can answer.
        origin: where it comes from, for people: file, package and version, prompt, model.
    """

    server: str
    name: str
    description: str
    parameters: Mapping[str, Any]
    category: str
    source: Source
    operation: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def declaration(self) -> dict[str, Any]:
        """Its declaration in OpenAI's form."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


@dataclass(frozen=True)
class Domain(Record):
    """An application domain: the world that its tools act on.

    Attributes:
        name: unique in the repository, ``category/domain`` for evolved ones.
        category: as of its tools.
        description: what one does there.
        types: of the entities of its world (``world/README.md``).
        policy: rules that an agent of it must keep, a sentence each.
        origin: where it comes from.
    """

    name: str
    category: str
    description: str
    types: Mapping[str, Any]
    policy: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Agent(Record):
    """A system prompt and the tools that come with it; ``tools`` are ids, ``domain`` a name."""

    domain: str
    system: str
    tools: tuple[str, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """One demand of a rubric.

    Attributes:
        name: unique in its rubric.
        text: for the judge and for people.
        kind: ``success``: the world or the last answer; ``pattern``: how tools are used;
            ``checkpoint``: what has to have happened on the way.
        check: machine-checked by ``judge/rules.py``; None: only a judge can say.
        mandatory: a trajectory that fails it is dropped, whatever its other scores.
    """

    name: str
    text: str
    kind: Literal["success", "pattern", "checkpoint"]
    check: Mapping[str, Any] | None = None
    mandatory: bool = True


@dataclass(frozen=True)
class AgentTask(Record):
    """What a simulated user wants of an agent, and when it counts as done.

    Attributes:
        agent: id.
        level: 1 (one call) to 5 (many dependent calls, a refusal or a change of mind).
        world: the records before the first turn, entity -> key -> record.
        persona: ``style`` and ``name`` of the user.
        goal: what the user wants; the policy never sees it.
        opening: the user's first words.
        rubric: criteria, ``Criterion`` as JSON values.
        plan: calls that reach the goal, ``{"name", "arguments"}`` each, the proof that it can be
            reached; ``$result.N.path`` stands for a part of an earlier call's result.
        faults: what the simulator does besides succeeding (``world/faults.py``).
        seed: of the simulator and the user.
        origin: where it comes from.
    """

    agent: str
    level: int
    world: Mapping[str, Mapping[str, Mapping[str, Any]]]
    persona: Mapping[str, Any]
    goal: str
    opening: str
    rubric: tuple[Mapping[str, Any], ...]
    plan: tuple[Mapping[str, Any], ...] = ()
    faults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """Its rubric."""
        return tuple(Criterion(**one) for one in self.rubric)


@dataclass(frozen=True)
class Call:
    """A tool call of a trajectory and what became of it.

    Attributes:
        turn: index of the assistant's message in ``Trajectory.messages``.
        call_id: of the message's call.
        name, arguments: as the model gave them; arguments are None where they are no JSON object.
        outcome: ``ok``; ``partial``: some of a batch; ``invalid``: against the declaration;
            ``refused``: a condition of the world does not hold; ``failed`` and ``timeout``: a
            fault. All but ``ok`` and ``partial`` leave the world as it was.
        fault: name of the injected fault, "" for none.
        content: what the model was told.
        latency_s: simulated seconds, or real ones of a real server.
        before, after: ids of the world's state.
    """

    turn: int
    call_id: str
    name: str
    arguments: Mapping[str, Any] | None
    outcome: Outcome
    content: str
    fault: str = ""
    latency_s: float = 0.0
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Trajectory(Record):
    """A dialogue of an agent with a user and tools.

    Attributes:
        task: id.
        attempt: counts the trajectories of a task from 0.
        messages: in OpenAI's form, system prompt first, tool calls and results included.
        tools: declarations, in OpenAI's form, as the model saw them.
        calls: ``Call`` as JSON values, in order.
        world: the records at the end, as ``AgentTask.world``; None for real servers.
        ending: by the policy, the user, the limit of turns, the context, or a failure.
        executed: ``simulated`` or ``real``.
        model: that played the agent.
        evidence: objective results of real execution: files, exit states, tests.
    """

    task: str
    attempt: int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    calls: tuple[Mapping[str, Any], ...]
    world: Mapping[str, Mapping[str, Mapping[str, Any]]] | None
    ending: Ending
    executed: Literal["simulated", "real"] = "simulated"
    model: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def made(self) -> tuple[Call, ...]:
        """Its calls."""
        return tuple(Call(**one) for one in self.calls)


@dataclass(frozen=True)
class Judgement(Record):
    """What was said of a trajectory.

    Attributes:
        trajectory: id.
        passes: every mandatory criterion holds and no rule is broken.
        scores: criterion -> 0 to 1; None where nobody could say.
        by: criterion -> ``rule``, ``judge`` or ``sandbox``.
        quotes: criterion -> what a judge quoted, found word for word in the trajectory.
        reasons: why it fails, kinds of ``judge/reasons.py``.
        judges: models that were asked.
    """

    trajectory: str
    passes: bool
    scores: Mapping[str, float | None]
    by: Mapping[str, str]
    quotes: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()


def field_names(record: type[Record]) -> tuple[str, ...]:
    """Return the names of a record's fields, in their order."""
    return tuple(one.name for one in fields(record))
