"""All checks of one rewriting, cheap ones first; models are asked only about what passed before.

A check that does not apply (names in a translation, say) is stored as skipped and neither passes
nor fails. Which checks a run uses and their thresholds are part of its identity (`run.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from megatron_k2.data.rephrase.judges import Ask, Entail, check_by_judge, check_entailment
from megatron_k2.data.rephrase.languages import language
from megatron_k2.data.rephrase.plain_checks import COVERAGE, WORDING, Passage, plain_verdicts
from megatron_k2.data.rephrase.similarity import Embed, check_similarity, embed_locally
from megatron_k2.data.rephrase.verdict import Verdict

CHECKS = (*COVERAGE, *WORDING, "similarity", "entailment", "judge")
DEFAULT_CHECKS = (*COVERAGE, *WORDING, "similarity")
# Of hashed n-grams, from the planted set's half for it: no faithful pair there is below.
MIN_SIMILARITY, MIN_SENTENCE_SIMILARITY = 0.35, 0.28
Result = TypeVar("Result")


@dataclass(frozen=True)
class Thresholds:
    """What checks with a score ask for at least; see the flags of the same names."""

    similarity: float = MIN_SIMILARITY
    sentence_similarity: float = MIN_SENTENCE_SIMILARITY
    entailment: float = 0.5  # more likely than not
    judge: float = 7.0  # of 10


class Fidelity:
    """The checks of a run."""

    def __init__(
        self,
        checks: Sequence[str] = DEFAULT_CHECKS,
        thresholds: Thresholds | None = None,
        embed: Embed = embed_locally,
        entail: Entail | None = None,
        ask: Ask | None = None,
        executor: Executor | None = None,
    ) -> None:
        unknown = set(checks) - set(CHECKS)
        if unknown:
            raise ValueError(f"--checks {' '.join(sorted(unknown))}: known are {' '.join(CHECKS)}")
        if "entailment" in checks and entail is None:
            raise ValueError("--checks entailment: name the model with --entailment")
        if "judge" in checks and ask is None:
            raise ValueError("--checks judge: name the model with --judge-model")
        self.checks = tuple(check for check in CHECKS if check in checks)
        self.thresholds = thresholds or Thresholds()
        self._embed, self._entail, self._ask = embed, entail, ask
        self._executor = executor or ThreadPoolExecutor(1)

    async def in_background(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function beside the event loop, which must send requests meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, partial(function, *arguments))

    def close(self) -> None:
        """End what checks run in."""
        self._executor.shutdown()

    async def judge(
        self,
        passage: Passage,
        rewrite: str,
        judge_prompt: dict[str, str],
        seed: int,
        stop_early: bool = True,
    ) -> list[Verdict]:
        """Return the verdicts on a rewriting, up to the first group with a failure.

        Args:
            passage: the source.
            rewrite: the answer.
            judge_prompt: of the prompt library.
            seed: of the judge's sampler.
            stop_early: ask no model about what a cheaper check refused.
        """
        verdicts = await self.in_background(plain_verdicts, self.checks, passage, rewrite)
        steps = (
            lambda: self._similarity(passage, rewrite),
            lambda: self._entailment(passage, rewrite),
            lambda: self._judged(passage, rewrite, judge_prompt, seed),
        )
        for check, step in zip(("similarity", "entailment", "judge"), steps, strict=True):
            if stop_early and any(verdict.passed is False for verdict in verdicts):
                return verdicts
            if check in self.checks:
                verdicts.append(await step())
        return verdicts

    async def _similarity(self, passage: Passage, rewrite: str) -> Verdict:
        translated = passage.source_language != passage.output_language
        if self._embed is embed_locally and (translated or passage.may_add_steps):
            return Verdict.skipped("similarity", "hashed-ngrams compare texts of one language only")
        least = self.thresholds
        known = language(passage.output_language)
        return await check_similarity(
            passage.source, rewrite, known, self._embed, least.similarity, least.sentence_similarity
        )

    async def _entailment(self, passage: Passage, rewrite: str) -> Verdict:
        assert self._entail is not None
        known, least = language(passage.output_language), self.thresholds.entailment
        return await check_entailment(
            passage.source, passage.context, rewrite, known, self._entail, least
        )

    async def _judged(
        self, passage: Passage, rewrite: str, prompt: dict[str, str], seed: int
    ) -> Verdict:
        assert self._ask is not None
        return await check_by_judge(
            passage.source, rewrite, prompt, self._ask, seed, self.thresholds.judge
        )
