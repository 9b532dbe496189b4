"""Continuous batching: which rows of which sequences the next step computes.

Every decoding sequence gets its one token, then prompts get chunks, oldest first, until the step's
token budget is used (chunked prefill, Sarathi: arXiv 2308.16369). A waiting request is admitted
when the cache has blocks for all of its tokens; of equal prompts one is read and the others wait a
step for it (prefixes.py), and what an ended request left is taken over (kept.py). When a decoding
sequence needs a block and none is free, the youngest sequence is preempted: its blocks are freed
and its tokens, generated ones too, are computed again later. One sequence alone always fits, so
that somebody always advances. All decisions follow from the requests' order: no clock, no random
number.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from megatron_k2.engine.base import EngineFull, Request
from megatron_k2.engine.batch import Span
from megatron_k2.engine.cache import BLOCK_TOKENS, LatentCache, blocks_for
from megatron_k2.engine.kept import KeptPages
from megatron_k2.engine.prefixes import SharedPrompts


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine.

    Attributes:
        max_context: tokens of a sequence, prompt and answer.
        cache_tokens: tokens that the cache holds over all sequences.
        max_running: sequences under way at once.
        step_tokens: rows that a step computes at most; prompts are cut to fit.
        max_waiting: requests that wait; one more is refused with ``EngineFull``.
        keeps_pages: what a request has read stays in the cache after its end, see kept.py.
    """

    max_context: int
    cache_tokens: int
    max_running: int = 64
    step_tokens: int = 512
    max_waiting: int = 256
    keeps_pages: bool = False

    def __post_init__(self) -> None:
        """Check that one sequence fits.

        Raises:
            ValueError: it does not, or a bound is not positive.
        """
        if min(self.max_context, self.max_running, self.step_tokens, self.max_waiting) < 1:
            raise ValueError(f"every limit of the engine must be 1 or more: {self}")
        if blocks_for(self.cache_tokens) < blocks_for(self.max_context):
            raise ValueError(
                f"cache_tokens {self.cache_tokens} must hold one sequence of max_context "
                f"{self.max_context} tokens"
            )
        if self.step_tokens <= self.max_running:
            raise ValueError(
                f"step_tokens {self.step_tokens} must exceed max_running {self.max_running}: "
                "every running sequence gets a token a step, and prompts at least two"
            )


@dataclass(eq=False)
class Sequence:
    """A request under way.

    Attributes:
        tokens: prompt and answer so far.
        cached: tokens whose latents are in the cache.
        given: of these, were there when it was admitted.
        blocks: held in the cache.
        weights: the first cached token was read by, see ``KeptPages``.
        source: of the request's random numbers.
    """

    request: Request
    tokens: list[int]
    cached: int = 0
    given: int = 0
    blocks: list[int] = field(default_factory=list)
    weights: int = 0
    source: random.Random = field(default_factory=random.Random)

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the prompt."""
        return tuple(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_decoding(self) -> bool:
        """Tell whether only the last token is not cached yet."""
        return self.cached == len(self.tokens) - 1 and self.cached > 0


class Scheduler:
    """The queues of an engine, oldest first."""

    def __init__(self, limits: Limits, cache: LatentCache) -> None:
        self.limits, self.cache = limits, cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prompts, self.kept = SharedPrompts(cache), KeptPages(cache)
        self.preemptions = 0

    def __len__(self) -> int:
        """Requests under way."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request, seed: int) -> None:
        """Queue a request.

        Raises:
            EngineFull: ``max_waiting`` requests wait.
        """
        if len(self.waiting) >= self.limits.max_waiting:
            raise EngineFull(f"{len(self.waiting)} requests are waiting; try again later")
        self.waiting.append(Sequence(request, list(request.prompt), source=random.Random(seed)))

    def find(self, request_id: str) -> Sequence | None:
        """Return the sequence of a request, or None."""
        both = (*self.running, *self.waiting)
        return next((one for one in both if one.request.id == request_id), None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and leave its blocks."""
        self.prompts.forget(sequence)
        if self.limits.keeps_pages:
            done = sequence.tokens[: sequence.cached]
            self.kept.keep(done, sequence.blocks, sequence.weights)
        self.cache.give_back(sequence.blocks)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def new_weights(self) -> None:
        """Note new weights: what is cached is not what a new request would get."""
        self.prompts.forget_all()
        self.kept.new_weights()
        for sequence in self.running:
            if not sequence.cached:
                sequence.weights = self.kept.weights

    def recompute_all(self) -> None:
        """Free every running sequence's blocks; their tokens are computed again, in order."""
        self.kept.forget_all()
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)

    def plan(self) -> list[tuple[Sequence, Span]]:
        """Return the next step's rows, decoding sequences first; empty when nothing is to do."""
        for sequence in [one for one in self.running if one.is_decoding]:
            self._grow(sequence)
        self._admit()
        waits = [one for one in self.running if not self._begins(one)]
        decoding = [one for one in self.running if one.is_decoding]
        decoding.sort(key=lambda one: len(one.tokens))  # stable; lengths alike are padded less
        planned = [(one, Span(one.tokens[-1:], one.cached, one.blocks)) for one in decoding]
        budget = self.limits.step_tokens - len(planned)
        for sequence in self.running:
            if budget <= 0 or sequence.is_decoding or sequence in waits:
                continue
            if (chunk := self._chunk(sequence, budget)) is not None:
                planned.append((sequence, chunk))
                budget -= len(chunk.tokens)
        return planned

    def _begins(self, sequence: Sequence) -> bool:
        """Tell whether a sequence goes on; one whose prompt another is reading waits for it."""
        is_new = sequence.cached == sequence.given < len(sequence.prompt) - 1
        if not is_new or sequence.weights != self.kept.weights:
            return True
        return self.prompts.begin(sequence)

    def _chunk(self, sequence: Sequence, budget: int) -> Span | None:
        """Return the next rows of a prompt, or None where the budget leaves no good ones.

        All but the last token, which decodes; but a lone row with a past would be taken for a
        decoding one: the last two go together, or wait for a wider budget.
        """
        length, cached = len(sequence.tokens), sequence.cached
        missing = length - 1 - cached
        if missing <= 1 and (cached or length == 1):
            missing = length - cached
        stop = cached + min(missing, budget)
        if stop - cached == 1 and cached:
            return None
        return Span(sequence.tokens[cached:stop], cached, sequence.blocks, stop == length)

    def _grow(self, sequence: Sequence) -> None:
        """Give a decoding sequence the block of its next token; preempt others, or itself."""
        while sequence in self.running and len(sequence.blocks) < blocks_for(len(sequence.tokens)):
            if self.kept.make_room(1):
                sequence.blocks += self.cache.take(1)
            else:
                self._preempt(self.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Move a running sequence to the head of the queue, its cache freed."""
        self.running.remove(sequence)
        self.prompts.forget(sequence)
        self.cache.give_back(sequence.blocks)
        sequence.cached = sequence.given = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> None:
        """Start waiting requests while there is room for all of their tokens and one more."""
        while self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            blocks, weights = self.kept.find(sequence.tokens, sequence.request.old_latents)
            # One block for each who decodes: who is admitted is not preempted in the next step.
            spare = len(self.running)
            needed = blocks_for(len(sequence.tokens) + 1) - len(blocks)
            if not self.kept.make_room(needed + spare) and self.running:
                self.cache.give_back(blocks)
                return
            sequence.cached = sequence.given = len(blocks) * BLOCK_TOKENS
            sequence.weights, sequence.blocks = weights, blocks + self.cache.take(needed)
            self.kept.num_tokens += sequence.given
            self.running.append(self.waiting.popleft())
