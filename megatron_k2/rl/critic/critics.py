"""Who judges: the policy itself, a frozen judge, or a script.

A critic gets a brief and comparisons and gives back its words; ``brief.read`` makes verdicts of
them. In Kimi K2 the policy is its own critic, with the weights that are trained
(arXiv 2507.20534, 3.2.2): the record has the versions that every answer was sampled from.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Completion, Engine, EngineFull, Request, Sampling, generate
from megatron_k2.gym.services import Judge
from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.sync.fingerprint import SyncRefused

ANSWER_TOKENS = 512  # of a critic's answer at most, thoughts included
WAIT_S, WAITS = 0.05, 200  # of a request that a full engine refused: 10 s in all, then an error


class CriticFailed(RuntimeError):
    """There is no answer of the critic: what it was asked about stays unjudged."""


@dataclass(frozen=True)
class Said:
    """A critic's answer; ``versions`` of the weights that sampled it, empty where unknown."""

    text: str
    versions: tuple[int, ...] = ()


class Critic(Protocol):
    """What judges comparisons."""

    @property
    def model(self) -> str:
        """Name for the record."""

    async def say(self, brief: Brief, comparisons: Sequence[Comparison], seed: int) -> Said:
        """Return the answer to a brief.

        Raises:
            CriticFailed: there is none.
        """


class PolicyCritic:
    """The policy, through its engine.

    Args:
        engine: with the weights under training; a ``GatedEngine`` in a run.
        chat_format: of the model.
        temperature: 0, the default: the same weights judge the same way.
        max_tokens: of an answer.
        concurrency: requests at once.
        model: name for the record.
    """

    def __init__(
        self,
        engine: Engine,
        chat_format: ChatFormat,
        temperature: float = 0.0,
        max_tokens: int = ANSWER_TOKENS,
        concurrency: int = 64,
        model: str = "policy",
    ) -> None:
        self._engine, self._format = engine, chat_format
        self._temperature, self._max_tokens = temperature, max_tokens
        self._gate = asyncio.Semaphore(concurrency)
        self._numbers = itertools.count()
        self._model = model

    @property
    def model(self) -> str:
        """Name for the record."""
        return self._model

    async def say(self, brief: Brief, comparisons: Sequence[Comparison], seed: int) -> Said:
        """Ask the engine; see ``Critic.say``.

        Raises:
            CriticFailed: see ``Critic.say``.
            SyncRefused: the engine's weights are not shown to be the trainer's.
        """
        messages = brief.messages(comparisons)
        prompt = tuple(self._format.encode(messages))
        room = self._engine.max_context - len(prompt)
        if room < 1:
            raise CriticFailed(
                f"{len(prompt)} tokens of comparisons leave no room in a context of "
                f"{self._engine.max_context}"
            )
        sampling = Sampling(
            min(self._max_tokens, room),
            temperature=self._temperature,
            seed=seed,
            stop_ids=tuple(self._format.stop_ids),
        )
        request = Request(f"critic-{next(self._numbers)}", prompt, sampling)
        async with self._gate:
            completion = await self._patiently(request)
        if completion.finish_reason == "abort":
            raise CriticFailed("the critic's answer was aborted")
        reader = self._format.parser(messages)
        reader.feed(completion.ids)
        message = reader.finish()[1].message
        return Said(str(message.get("content") or ""), tuple(sorted(set(completion.versions))))

    async def _patiently(self, request: Request) -> Completion:
        for _ in range(WAITS):
            try:
                return await generate(self._engine, request)
            except EngineFull:
                await asyncio.sleep(WAIT_S)
            except SyncRefused:  # wrong weights are no missing answer
                raise
            except (ValueError, RuntimeError) as error:
                raise CriticFailed(f"the engine refuses: {error}") from error
        raise CriticFailed(f"the engine stayed full for {WAITS * WAIT_S:.0f} s")


class JudgeCritic:
    """A frozen judge: ``Services.judge``."""

    def __init__(self, judge: Judge, max_tokens: int = ANSWER_TOKENS) -> None:
        self._judge, self._max_tokens = judge, max_tokens

    @property
    def model(self) -> str:
        """Name for the record."""
        return self._judge.model

    async def say(self, brief: Brief, comparisons: Sequence[Comparison], seed: int) -> Said:
        """Ask the judge; see ``Critic.say``."""
        try:
            return Said(await self._judge.ask(brief.messages(comparisons), seed, self._max_tokens))
        except (TimeoutError, RuntimeError) as error:
            raise CriticFailed(f"{self.model}: {error}") from error


class ScriptedCritic:
    """A function as critic, for tests and evidence; no model judges."""

    def __init__(
        self, script: Callable[[Brief, Sequence[Comparison], int], str], model: str = "script"
    ) -> None:
        self._script, self._model = script, model

    @property
    def model(self) -> str:
        """Name for the record."""
        return self._model

    async def say(self, brief: Brief, comparisons: Sequence[Comparison], seed: int) -> Said:
        """Call the function; see ``Critic.say``."""
        return Said(self._script(brief, comparisons, seed))
