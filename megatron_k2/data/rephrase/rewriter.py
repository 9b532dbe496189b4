"""One document's rewritings: chunk by chunk, each with the excerpt and what was rewritten before.

Excerpts and rephrasings go side by side, the chunks of an excerpt one after the other. Every
attempt is looked up in the journal first, so a second run asks the model nothing that it answered
before: an answer is recorded as soon as it comes, its verdicts once they are known. Its seed comes
from the run's, the document's content and its place, so it is the same on every machine. A chunk
whose attempts all fail is dropped, kept as its source, or takes its document along.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_k2.data.rephrase.chunks import (
    CountTokens,
    Excerpt,
    Span,
    estimate_tokens,
    prose_share,
    split_document,
)
from megatron_k2.data.rephrase.client import ChunkRefused, Client
from megatron_k2.data.rephrase.faults import check_faults
from megatron_k2.data.rephrase.fidelity import Fidelity
from megatron_k2.data.rephrase.journal import ATTEMPT, Attempt, Journal
from megatron_k2.data.rephrase.languages import detect
from megatron_k2.data.rephrase.plain_checks import Passage
from megatron_k2.data.rephrase.prompts import Library, Prompt
from megatron_k2.data.rephrase.provenance import Chunk, count_chunks, make_record, stitch
from megatron_k2.data.rephrase.settings import Settings
from megatron_k2.data.rephrase.sources import Source
from megatron_k2.data.rephrase.verdict import Verdict

MIN_PROSE = 0.2  # of a chunk's characters: code, tables and formulae alone are kept as they are
_TAG = re.compile(r"\A\s*<(passage|rewritten)>(.*)</\1>\s*\Z", re.DOTALL)


class Rewriter:
    """Rewrites documents with one model, one set of prompts and one set of checks."""

    def __init__(
        self,
        client: Client,
        library: Library,
        fidelity: Fidelity,
        settings: Settings,
        count_tokens: CountTokens = estimate_tokens,
        on_chunk: Callable[[Chunk, float], None] = lambda chunk, share: None,
    ) -> None:
        self.client, self.library, self.fidelity = client, library, fidelity
        self.settings, self.count_tokens, self.on_chunk = settings, count_tokens, on_chunk

    async def rewrite(
        self, source: Source, journal: Journal
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return a document's rewritings, with their provenance, and what to count.

        Args:
            source: the document.
            journal: of its part.

        Raises:
            BudgetSpent, ServerGone, ValueError: the run must stop; what was answered is recorded.
        """
        chosen = self.settings
        found = detect(source.text)
        excerpts = split_document(
            source.text, chosen.chunk_tokens, chosen.excerpt_tokens, self.count_tokens
        )
        prompts = self.library.choose(
            source.hash, chosen.seed, chosen.rephrasings, chosen.task, found, chosen.language,
            chosen.styles, chosen.perspectives,
        )  # fmt: skip
        places = [(n, k) for n in range(len(prompts)) for k in range(len(excerpts))]
        done = await asyncio.gather(
            *(
                self._excerpt(source, found, prompts[n], f"{n}.{k}", excerpts[k], journal)
                for n, k in places
            ),
            return_exceptions=True,  # what others are still waiting for is recorded before we stop
        )
        chunks: dict[int, list[Chunk]] = {n: [] for n in range(len(prompts))}
        for (n, _), result in zip(places, done, strict=True):
            if isinstance(result, BaseException):
                raise result
            chunks[n] += result
        counts: Counter[str] = Counter(documents=1, **{f"source_language {found or 'unknown'}": 1})
        records = []
        for n, prompt in enumerate(prompts):
            count_chunks(chunks[n], counts)
            record = make_record(
                source, found, n, prompt, chunks[n], self.client.endpoint.model, chosen
            )
            counts["rewritings" if record else "rewritings_dropped"] += 1
            if record:
                counts[f"style {prompt.style}"] += 1
                counts[f"language {prompt.output_language or 'unknown'}"] += 1
                records.append(record)
        return records, counts

    async def _excerpt(
        self,
        source: Source,
        found: str,
        prompt: Prompt,
        place: str,
        excerpt: Excerpt,
        journal: Journal,
    ) -> list[Chunk]:
        """Rewrite the chunks of an excerpt in order."""
        context = source.text[excerpt.span.start : excerpt.span.end]
        done: list[Chunk] = []
        for index, span in enumerate(excerpt.chunks):
            key = f"{source.line}.{source.hash[:12]}.{place}.{index}"
            passage = Passage(
                source.text[span.start : span.end],
                context,
                found,
                prompt.output_language,
                may_add_steps=prompt.task == "learning-note",
            )
            chunk = await self._chunk(
                span, passage, prompt, stitch(done, source.text), key, journal
            )
            done.append(chunk)
            share = (span.end - span.start) / max(1, len(source.text)) / self.settings.rephrasings
            self.on_chunk(chunk, share)
        return done

    async def _chunk(
        self, span: Span, passage: Passage, prompt: Prompt, done: str, key: str, journal: Journal
    ) -> Chunk:
        """Rewrite a chunk until an attempt passes."""
        failures: Counter[str] = Counter()
        spent, thoughts = (0, 0), 0
        if prose_share(passage.source) < MIN_PROSE or not re.search(r"\w", passage.source):
            return Chunk(span, "copied", passage.source, None, failures, spent, thoughts)
        for number in range(self.settings.attempts):
            attempt = Attempt(journal, f"{key}.{number}")
            ATTEMPT.set(attempt)  # of this task: those of other excerpts have their own
            seed = seed_of(self.settings.seed, prompt.hash, key, number)
            messages = prompt.messages(passage.context, done, passage.source)
            answer = attempt.get("answer") or await self._ask(messages, seed, number, attempt)
            judged = attempt.get("verdicts")
            if judged is None:
                judged = await self._verdicts(passage, prompt, done, answer)
                attempt.record("verdicts", judged)
            spent = (spent[0] + answer["tokens"][0], spent[1] + answer["tokens"][1])
            thoughts += answer["thought"]
            if judged["passed"]:
                record, tried = {**answer, **judged}, number + 1
                text = answer["text"]
                return Chunk(span, "rewritten", text, record, failures, spent, thoughts, tried)
            failures.update(v["check"] for v in judged["verdicts"] if v["passed"] is False)
        kept = self.settings.on_failure == "source"
        text = passage.source if kept else ""
        kind = "source" if kept else "dropped"
        tried = self.settings.attempts
        return Chunk(span, kind, text, None, failures, spent, thoughts, tried)

    async def _ask(
        self, messages: list[dict[str, str]], seed: int, number: int, attempt: Attempt
    ) -> dict[str, Any]:
        """Ask the model once and record what it says."""
        sampler = self.settings.sampler
        if number:  # greedy answers would only be repeated
            warmer = max(sampler.temperature, self.settings.retry_temperature)
            sampler = replace(sampler, temperature=warmer)
        answer: dict[str, Any] = {
            **{"seed": seed, "temperature": sampler.temperature},
            **{"text": "", "tokens": [0, 0], "thought": False},
        }
        try:
            said = await self.client.chat(messages, sampler, seed)
            answer["text"], answer["finish_reason"] = _bare(said.text), said.finish_reason
            answer["tokens"] = [said.prompt_tokens, said.completion_tokens]
            answer["thought"] = said.thought
        except ChunkRefused as error:
            answer["refused"] = str(error)
        attempt.record("answer", answer)
        return answer

    async def _verdicts(
        self, passage: Passage, prompt: Prompt, done: str, answer: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the verdicts on an answer, and whether it passed."""
        try:
            if "refused" in answer:
                raise ChunkRefused(answer["refused"])
            verdicts = await self._judge(passage, prompt, done, answer)
        except ChunkRefused as error:
            verdicts = [Verdict("server", False, None, str(error))]
        return {
            "verdicts": [verdict.record() for verdict in verdicts],
            "passed": all(verdict.passed is not False for verdict in verdicts),
        }

    async def _judge(
        self, passage: Passage, prompt: Prompt, done: str, answer: dict[str, Any]
    ) -> list[Verdict]:
        """Return the verdicts on an attempt's text: its faults, or else its fidelity."""
        faults = await self.fidelity.in_background(
            check_faults,
            answer["text"],
            answer["finish_reason"],
            f"{passage.source}\0{passage.context}",
            prompt.instructions(),
            done,
            prompt.output_language,
            self.settings.length_bounds,
            self.settings.may_copy,
        )
        if faults:
            return faults
        judge = self.library.judge(prompt.language)
        return await self.fidelity.judge(passage, answer["text"], judge, answer["seed"])


def seed_of(run_seed: int, prompt_hash: str, key: str, attempt: int) -> int:
    """Return an attempt's seed, 31 bits, which every server takes."""
    text = f"{run_seed} {prompt_hash} {key} {attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1


def _bare(text: str) -> str:
    """Return an answer without white space around it and without the tags that it was asked in."""
    match = _TAG.match(text)
    return (match[2] if match else text).strip()
