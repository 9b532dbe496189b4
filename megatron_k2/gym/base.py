"""What an environment is: tasks, answers, verdicts, and an episode of steps.

In Gymnasium's manner, asynchronous and over messages: ``reset`` gives the first messages, ``step``
takes what the model said. A family of tasks with one answer each subclasses ``SingleTurn`` and
writes ``verify`` alone. Token ids are no concern of an environment: ``rl`` keeps them in a ledger.

A verdict is ``ok`` or ``wrong`` where the answer was judged, ``error`` or ``timeout`` where it
could not be: those have no score, take the episode out of its group, and are never a zero reward.
Every family brings its own proof: ``gold`` answers score 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from megatron_k2.chat.format import Message
from megatron_k2.gym.services import Services

Status = Literal["ok", "wrong", "error", "timeout"]
RIGHT = 0.99  # a score from here on is ``ok``: checkers of fractions may round


@dataclass(frozen=True)
class Task:
    """One problem. Everything in it is JSON.

    Attributes:
        id: unique in its environment, and the same whenever the tasks are loaded.
        env: name of the environment.
        messages: before the first answer, in OpenAI's form.
        metadata: what the environment needs for its verdict; the policy never sees it.
        tools: declarations, in OpenAI's form.
        tags: domain, difficulty and the like, ``key:value``; curation covers them.
        budget: tokens the policy may say in the whole episode; None takes the environment's.
    """

    id: str
    env: str
    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    tags: tuple[str, ...] = ()
    budget: int | None = None


@dataclass(frozen=True)
class Answer:
    """What the policy said in one turn.

    Attributes:
        text: content without reasoning.
        message: all of it in OpenAI's form: content, reasoning_content, tool_calls.
        problems: where it left the chat format; see ``chat.format.Parsed``.
        truncated: it ended by length, not by itself.
    """

    text: str
    message: Message = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class Verdict:
    """How an answer or an episode was judged; ``right``, ``wrong`` and ``unjudged`` make one.

    Attributes:
        score: in [0, 1]; None exactly where the status is ``error`` or ``timeout``.
        status: ``ok`` from a score of ``RIGHT`` on, ``wrong`` below.
        detail: for people: what was expected, which check failed.
        components: named parts of the score, in [0, 1].
        backend: what judged it, where that can differ: a sandbox, a judge's model.
    """

    score: float | None
    status: Status
    detail: str = ""
    components: Mapping[str, float] = field(default_factory=dict)
    backend: str = ""

    def __post_init__(self) -> None:
        """Check that score and status agree.

        Raises:
            ValueError: they do not, or the score is outside [0, 1].
        """
        judged = self.status in ("ok", "wrong")
        if judged != (self.score is not None):
            raise ValueError(f"a verdict of status {self.status!r} with score {self.score}")
        if self.score is not None:
            if not 0 <= self.score <= 1:
                raise ValueError(f"score {self.score} must be from 0 to 1")
            if (self.score >= RIGHT) != (self.status == "ok"):
                raise ValueError(f"a score of {self.score} is not {self.status!r}")


def judged(
    score: float,
    detail: str = "",
    components: Mapping[str, float] | None = None,
    backend: str = "",
) -> Verdict:
    """Return the verdict of a score in [0, 1]."""
    status: Status = "ok" if score >= RIGHT else "wrong"
    return Verdict(float(score), status, detail, components or {}, backend)


def unjudged(detail: str, status: Status = "error", backend: str = "") -> Verdict:
    """Return the verdict of what could not be judged; ``status`` is ``error`` or ``timeout``."""
    return Verdict(None, status, detail, backend=backend)


@dataclass(frozen=True)
class Observation:
    """The first messages of an episode and the tools that it declares."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Step:
    """What follows an answer: Gymnasium's five, with messages as observation.

    Attributes:
        messages: what the environment says next; empty at the end.
        reward: of this step; None while the verdict is open or could not be had.
        terminated: the episode is over by its own rules.
        truncated: it was cut, by a limit of turns say.
        verdict: at the end, and only there.
        info: for people and logs.
    """

    messages: tuple[Message, ...] = ()
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    verdict: Verdict | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """One episode at a time of one family of tasks; many run at once, each an instance.

    Attributes:
        name: in the registry.
        budget: tokens the policy may say in an episode, where the task names none.
        needs: of ``Services``: what must be there, ``judge`` or ``sandbox``.
    """

    name: ClassVar[str]
    budget: ClassVar[int] = 4096
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, services: Services) -> None:
        """Keep the services.

        Raises:
            ValueError: one that the family needs is missing.
        """
        for need in self.needs:
            if getattr(services, need) is None:
                raise ValueError(f"environment {self.name!r} needs a {need}: {services.how(need)}")
        self.services = services

    @classmethod
    @abstractmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> Sequence[Task]:
        """Return tasks, the same for the same arguments; a family may take options beyond these.

        Args:
            split: ``train`` or ``test``; the two share no task.
            num_tasks: at most so many; None: all, or a family's own number if it generates them.
            seed: of generated tasks.
        """

    @abstractmethod
    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return answers, a turn each, that score 1."""

    @classmethod
    async def prove(cls, tasks: Sequence[Task]) -> Sequence[str] | None:
        """Return what is wrong, for a family whose answers have no score alone; None: gold proves.

        Args:
            tasks: to prove it on.
        """
        return None

    @abstractmethod
    async def reset(self, task: Task, seed: int) -> Observation:
        """Begin an episode."""

    @abstractmethod
    async def step(self, answer: Answer) -> Step:
        """Take an answer.

        Raises:
            RuntimeError: no episode has begun, or it is over.
        """

    async def close(self) -> None:  # noqa: B027  # most hold nothing
        """Free what the episode holds; called once, whatever happened."""


class SingleTurn(Environment):
    """One question, one answer, one verdict."""

    _task: Task | None = None

    @abstractmethod
    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Judge an answer. Exceptions become a verdict of ``error``."""

    async def reset(self, task: Task, seed: int) -> Observation:
        """Begin an episode: its messages are the task's."""
        self._task = task
        return Observation(tuple(task.messages), tuple(task.tools))

    async def step(self, answer: Answer) -> Step:
        """Judge the answer and end the episode."""
        if self._task is None:
            raise RuntimeError("no episode: call reset first")
        task, self._task = self._task, None
        verdict = await judge_safely(self, task, answer)
        return Step(reward=verdict.score, terminated=True, verdict=verdict)


async def judge_safely(env: SingleTurn, task: Task, answer: Answer) -> Verdict:
    """Return ``env.verify``'s verdict; a verifier that fails is data, not a crash."""
    try:
        verdict = await env.verify(task, answer)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"verify gave {verdict!r}, which is no Verdict; see judged()")
        return verdict
    except TimeoutError as error:
        return unjudged(f"{type(error).__name__}: {error}", "timeout")
    except Exception as error:  # whatever a verifier raises ends one episode
        return unjudged(f"{type(error).__name__}: {error}")
