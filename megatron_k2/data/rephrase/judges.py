"""Checks by models: entailment sentence by sentence, and a language model as a judge.

No entailment model comes with this package (none is on the package index under an open licence that
we found); `hf:FOLDER` takes any Transformers sequence classifier with an "entailment" label, and
MODULE:FUNCTION any function of one's own. Judge and embedder may be on other servers.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from megatron_k2.data.rephrase.chunks import sentence_spans
from megatron_k2.data.rephrase.journal import ATTEMPT
from megatron_k2.data.rephrase.languages import Language
from megatron_k2.data.rephrase.prompts import fill
from megatron_k2.data.rephrase.settings import Sampler
from megatron_k2.data.rephrase.verdict import Verdict

Entail = Callable[[Sequence[tuple[str, str]]], Awaitable[list[float]]]
"""Pairs of premise and hypothesis -> probability that the first entails the second, each."""
Ask = Callable[[list[dict[str, str]], int], Awaitable[tuple[str, int]]]
"""Messages and a seed -> the judge's answer and the tokens it took."""

JUDGE_TOKENS = 512  # of an answer at most
JUDGE_TRIES = 2  # an answer that is no JSON is asked for once more, with another seed
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


async def check_entailment(
    source: str, context: str, rewrite: str, known: Language, entail: Entail, least: float
) -> Verdict:
    """Check that the source entails each sentence of the rewriting, and the other way round.

    Args:
        source: the chunk, each of whose sentences the rewriting must entail.
        context: the excerpt, which must entail each sentence of the rewriting.
        rewrite: the rewriting.
        known: its language.
        entail: the model.
        least: probability at least.
    """
    lost = _sentences(source, known)
    new = _sentences(rewrite, known)
    scores = await entail([(rewrite, x) for x in lost] + [(context, x) for x in new])
    missing = [x for x, score in zip(lost, scores, strict=False) if score < least]
    extra = [x for x, score in zip(new, scores[len(lost) :], strict=True) if score < least]
    verdict = Verdict.of_sets("entailment", missing, extra, len(lost))
    return Verdict("entailment", verdict.passed, round(min(scores, default=1.0), 4), verdict.detail)


async def check_by_judge(
    source: str, rewrite: str, prompt: dict[str, str], ask: Ask, seed: int, least: float
) -> Verdict:
    """Ask a language model whether the rewriting is faithful.

    Args:
        source: the chunk.
        rewrite: the rewriting.
        prompt: "system" and "user" of the prompt file's judge.
        ask: the model.
        seed: of its sampler.
        least: score of 10 at least.
    """
    user = fill(prompt["user"], {"passage": source, "done": rewrite})
    messages = [
        {"role": "system", "content": prompt["system"]},
        {"role": "user", "content": user},
    ]
    tokens = 0
    for attempt in range(JUDGE_TRIES):
        text, taken = await ask(messages, seed + attempt)
        tokens += taken
        answer = read_judgement(text)
        if answer is not None:
            faithful, score, problems = answer
            passed = faithful and score >= least
            return Verdict("judge", passed, score, "; ".join(problems)[:300], tokens)
    return Verdict("judge", False, None, "its answer is no judgement", tokens)


def read_judgement(answer: str) -> tuple[bool, float, list[str]] | None:
    """Return (faithful, score, problems) of a judge's answer, None if it is no judgement."""
    match = _OBJECT.search(answer)
    try:
        value: Any = json.loads(match[0]) if match else None
        if not isinstance(value, dict) or not isinstance(value.get("faithful"), bool):
            return None
        problems = value.get("problems") or []
        score = float(value["score"])
        if not 0 <= score <= 10:
            return None
        return value["faithful"], score, [str(item) for item in problems]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def endpoint_judge(client: Any) -> Ask:
    """Return the judge of an OpenAI-compatible server; its answers are recorded at once.

    Args:
        client: a `client.Client` of the server.
    """

    async def ask(messages: list[dict[str, str]], seed: int) -> tuple[str, int]:
        attempt, name = ATTEMPT.get(), f"judge {seed}"
        known = attempt.get(name) if attempt else None
        if known is None:
            answer = await client.chat(messages, Sampler(0.0, 1.0, JUDGE_TOKENS), seed)
            tokens = answer.prompt_tokens + answer.completion_tokens
            known = {"text": answer.text, "tokens": tokens}
            if attempt:
                attempt.record(name, known)
        return known["text"], known["tokens"]

    return ask


def load_entailment(name: str) -> Entail:
    """Return the entailment model of `--entailment`: hf:FOLDER or MODULE:FUNCTION.

    Raises:
        ValueError: there is none of that name.
    """
    if name.startswith("hf:"):
        return _transformers_entailment(name.removeprefix("hf:"))
    module, _, attribute = name.partition(":")
    try:
        found: Entail = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--entailment {name}: wanted hf:FOLDER or MODULE:FUNCTION ({error})"
        ) from error
    return found


def _transformers_entailment(folder: str) -> Entail:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--entailment hf:{folder}: {str(error).splitlines()[0]}") from error
    labels = {name.lower(): index for index, name in model.config.id2label.items()}
    if "entailment" not in labels:
        raise ValueError(f"--entailment hf:{folder}: has labels {sorted(labels)}, no entailment")
    index = labels["entailment"]
    model.eval()

    def run(pairs: Sequence[tuple[str, str]]) -> list[float]:
        first, second = zip(*pairs, strict=True)
        batch = tokenizer(
            list(first), list(second), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            return model(**batch).logits.float().softmax(-1)[:, index].tolist()

    async def entail(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return await asyncio.to_thread(run, pairs) if pairs else []

    return entail


def _sentences(text: str, known: Language) -> list[str]:
    found = (text[span.start : span.end].strip() for span in sentence_spans(text, known))
    return [part for part in found if part]
