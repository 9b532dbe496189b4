"""One episode: the environment's words, the engine's answers, a verdict.

The ledger is the only record: after ``pause`` an answer goes on from its ids, with whatever weights
the engine has then, and after a restart the environment is led to the same place by its recorded
answers (replay.py). Seeds come from the run's seed, the group and the index, and of a request
also from its place in the ledger, so that neither batch nor order changes what is drawn.
"""

from __future__ import annotations

from typing import Literal

from megatron_k2.chat.ledger import TokenLedger
from megatron_k2.engine.base import Completion, Engine, Request, Sampling
from megatron_k2.gym.base import Environment, Step, Verdict, judged, unjudged
from megatron_k2.gym.services import Services
from megatron_k2.rl.episode import Ending, Episode
from megatron_k2.rl.rollout.fresh import seed_of
from megatron_k2.rl.rollout.metrics import Meter
from megatron_k2.rl.rollout.repetition import LoopWatch
from megatron_k2.rl.rollout.replay import Elsewhere, answer_of, replay
from megatron_k2.rl.rollout.requests import ask
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.slots import Slots
from megatron_k2.rl.rollout.stage import Stage, Unjudged

Cut = Literal["budget", "context", "repetition"]
WHY: dict[str, str] = {
    "budget": "the token budget was used up before the environment had ended",
    "context": "the engine's context was full before the environment had ended",
    "repetition": "the answer was ended as a loop before the environment had ended",
    "turns": "the limit of turns was reached before the environment had ended",
}


class Play:
    """An episode under way.

    Attributes:
        episode: what is known of it.
        restarts: how often it was begun anew.
        wants_slot: it generates, or will as soon as it may.
    """

    def __init__(
        self,
        episode: Episode,
        priority: tuple[int, int],
        engine: Engine,
        slots: Slots,
        environment: type[Environment],
        services: Services,
        settings: RolloutSettings,
        meter: Meter,
        restarts: int = 0,
    ) -> None:
        self.episode, self.priority, self.restarts = episode, priority, restarts
        self._engine, self._slots, self._settings, self._meter = engine, slots, settings, meter
        self._kind, self._services = environment, services
        self._format = episode.ledger.format
        self._budget = settings.budget_of(episode.task, environment.budget)
        self._stage: Stage | None = None
        self._request = ""  # id of the one under way
        self._is_resting = False
        self._said = episode.num_sampled
        self._turns = sum(span.writer == "engine" for span in episode.ledger.spans)
        self._iteration, self._said_now = 0, 0

    @property
    def wants_slot(self) -> bool:
        """Tell whether it uses a slot, or will as soon as it may."""
        return not self._is_resting and not (self._stage is not None and self._stage.is_working)

    @property
    def is_resting(self) -> bool:
        """Tell whether it has had its tokens of this iteration."""
        return self._is_resting

    async def run(self) -> None:
        """Play to the end; the episode has an ending and a verdict then.

        Raises:
            StaleTokens, SyncRefused: see ``requests.ask``.
        """
        for attempt in range(1, self._settings.env_tries + 1):
            is_final = attempt == self._settings.env_tries
            try:
                ending, verdict = await self._play()
            except Unjudged as error:
                ending, verdict = "failed", error.verdict
                is_final = is_final or error.is_final
            finally:
                if self._stage is not None:
                    await self._stage.close()
            if is_final or verdict.status != "error":
                break
            self._meter.now.env_retries += 1
        if verdict.score is None:
            ending = "failed"
        self.episode.ending, self.episode.verdict = ending, verdict

    async def pause(self) -> None:
        """Have the engine end the request that is under way; ``slots`` are shut already."""
        if self._request:
            await self._engine.abort(self._request)

    async def _play(self) -> tuple[Ending, Verdict]:
        step = await self._begin()
        cut = None if step is None else self._cut_of_last()
        while True:
            if step is not None:
                ended = _end_of(step, cut)
                if ended is not None:
                    return ended
                if self._said >= self._budget:
                    return "budget", judged(0.0, WHY["budget"])
                self._said_by_environment(step)
            if self._turns >= self._settings.max_turns and not self._ledger.is_answering:
                return "turns", judged(0.0, WHY["turns"])
            cut, is_empty = await self._answer()
            if is_empty:
                return self._without_answer(cut)
            step = await self._staged().step(answer_of(self._ledger, self._ledger.spans[-1]))

    def _without_answer(self, cut: Cut | None) -> tuple[Ending, Verdict]:
        """Return how an episode ends in which nothing more can be said."""
        assert cut is not None
        if self._turns == 1:  # no fault of the policy
            context = self._engine.max_context
            said = f"the prompt has {len(self._ledger.ids)} tokens, the engine's context {context}"
            raise Unjudged(unjudged(said), is_final=True)
        return cut, judged(0.0, WHY[cut])

    @property
    def _ledger(self) -> TokenLedger:
        return self.episode.ledger

    def _staged(self) -> Stage:
        assert self._stage is not None
        return self._stage

    async def _begin(self) -> Step | None:
        """Reset the environment and lead it to where the ledger ends; return an open step."""
        recorded = self._ledger
        if any(span.writer == "engine" for span in recorded.spans):
            try:
                ledger, step = await replay(recorded, await self._reset(), self._staged())
                self.episode.ledger = ledger
                return step
            except Elsewhere:
                await self._staged().close()
                self.restarts += 1
                self._meter.now.restarts["replay"] += 1
                self._said = self._turns = 0
        self.episode.ledger = await self._reset()
        return None

    async def _reset(self) -> TokenLedger:
        settings = self._settings
        self._stage = Stage(self._kind, self._services, settings.env_timeout_s, self._meter)
        seen = await self._stage.reset(self.episode.task, self.episode.seed)
        try:
            return TokenLedger.begin(self._format, seen.messages, seen.tools)
        except ValueError as error:
            raise Unjudged(unjudged(f"reset: the format cannot say it: {error}")) from error

    def _said_by_environment(self, step: Step) -> None:
        try:
            self._ledger.add(step.messages)
        except ValueError as error:
            raise Unjudged(unjudged(f"step: the format cannot say it: {error}")) from error

    def _cut_of_last(self) -> Cut | None:
        """Return what had cut the last answer, after a restart."""
        span = self._ledger.spans[-1]
        if not answer_of(self._ledger, span).truncated:
            return None
        room, bound = self._room()
        if room <= 0:
            return bound
        rule = self._settings.repetition
        if rule is not None and LoopWatch(rule).feed(self._ledger.ids[span.begin : span.end]):
            return "repetition"
        return None

    def _room(self) -> tuple[int, Cut]:
        """Return how many tokens the answer may still have, and what bounds it."""
        by_budget = self._budget - self._said
        by_context = self._engine.max_context - len(self._ledger.ids)
        return (by_budget, "budget") if by_budget <= by_context else (by_context, "context")

    async def _answer(self) -> tuple[Cut | None, bool]:
        """Have the engine answer; return what cut it, and whether there is no answer at all."""
        ledger = self._ledger
        if not ledger.is_answering:
            ledger.begin_answer()
            self._turns += 1
        begin = ledger.spans[-1].begin
        while True:
            room, bound = self._room()
            if room <= 0:
                ledger.end_answer()
                return bound, len(ledger.ids) == begin
            reason = await self._segment(room, begin)
            if reason == "stop" or reason == "repetition":
                ledger.end_answer()
                return (None if reason == "stop" else "repetition"), False
            if reason == "short":  # by a bound of the engine's own
                ledger.end_answer()
                return "context", False

    async def _segment(self, room: int, begin: int) -> str:
        """Take a slot and let the engine go on; return why it ended."""
        ledger = self._ledger
        rules = await self._slots.take(self.priority)
        try:
            if self._iteration != self._slots.iteration:
                self._iteration, self._said_now = self._slots.iteration, 0
            most = room
            if rules.segment_tokens:
                most = min(room, rules.segment_tokens - self._said_now)
            if most > 0:
                self._request = f"{self.episode.id}@{len(ledger.ids)}"
                sampling = Sampling(
                    most,
                    rules.temperature,
                    rules.top_p,
                    seed=seed_of(self.episode.seed, len(ledger.ids)),
                    stop_ids=self._format.stop_ids,
                )
                may_be_old = self._settings.old_latents and self._said > 0
                request = Request(self._request, tuple(ledger.ids), sampling, may_be_old)
                found, loops = await ask(
                    self._engine, request, self._slots, lambda: self._watch(begin),
                    self._settings, self._meter,
                )  # fmt: skip
                self._take(found)
                if loops:
                    return "repetition"
                if found.finish_reason == "stop":
                    return "stop"
                if found.finish_reason == "length" and len(found.ids) < most:
                    return "short"
        finally:
            self._request = ""
            self._slots.give_back()
        if rules.segment_tokens and self._said_now >= rules.segment_tokens and self._room()[0] > 0:
            await self._rest()
        return "goes on"

    async def _rest(self) -> None:
        """Wait for the next iteration."""
        if self._slots.iteration != self._iteration:
            return
        self._is_resting = True
        self._slots.on_change()
        try:
            await self._slots.next_opening()
        finally:
            self._is_resting = False

    def _take(self, found: Completion) -> None:
        try:
            self._ledger.extend(found.ids, found.log_probs, found.versions, found.routed_experts)
        except ValueError as error:
            said = f"the engine's tokens cannot be kept: {error}"
            raise Unjudged(unjudged(said), is_final=True) from error
        self._said += len(found.ids)
        self._said_now += len(found.ids)
        self._meter.now.tokens += len(found.ids)

    def _watch(self, begin: int) -> LoopWatch | None:
        if self._settings.repetition is None:
            return None
        watch = LoopWatch(self._settings.repetition)
        watch.feed(self._ledger.ids[begin:])
        return watch


def _end_of(step: Step, cut: Cut | None) -> tuple[Ending, Verdict] | None:
    """Return ending and verdict if the episode is over after a step."""
    if step.terminated or step.truncated:
        verdict = step.verdict or unjudged("the environment ended without a verdict")
        return cut or ("finished" if step.terminated else "turns"), verdict
    if cut is not None:
        return cut, judged(0.0, WHY[cut])
    return None
