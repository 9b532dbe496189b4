"""What flags may hold, and what of them only prompts, models and documents tell.

All of it is looked at before anything is written or asked: a flag that cannot be ends the run with
one line that names it, not with a traceback after an hour.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from urllib.parse import urlsplit

from megatron_k2.data.rephrase.chunks import CountTokens, estimate_tokens, split_document
from megatron_k2.data.rephrase.languages import detect
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.settings import Sampler, Settings
from megatron_k2.data.rephrase.sources import Source

# Least and most; "above" where the least itself cannot be.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("concurrency", "documents_per_part", "max_tries", "ray_workers"), (1, 1e9)),
    **dict.fromkeys(("attempts", "rephrasings", "limit"), (1, 1e9)),
    **dict.fromkeys(("max_requests", "max_tokens", "max_new_tokens"), (0, 1e18)),
    "check_processes": (0, 1e4),
    "timeout_s": (0.001, 1e7),
    **dict.fromkeys(("temperature", "retry_temperature"), (0, 100)),
    "top_p": (1e-9, 1),
    **dict.fromkeys(("min_similarity", "min_sentence_similarity"), (-1, 1)),
    "min_entailment": (0, 1),
    "min_judge": (0, 10),
}


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags, before anything is written.

    Raises:
        ValueError: one that cannot be.
    """
    for flag in ("input", "output", "server", "model"):
        if not getattr(args, flag):
            raise ValueError(f"--{flag} is missing")
    _check_ranges(args)
    for flag in ("server", "judge_server", "embedding_server"):
        _check_address(f"--{flag.replace('_', '-')}", getattr(args, flag))
    try:
        if not isinstance(json.loads(args.extra_body), dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--extra-body {args.extra_body}: wanted a JSON object ({error})"
        ) from error
    chosen = settings_of(args)
    split_document("", chosen.chunk_tokens, chosen.excerpt_tokens)
    library = Library(args.prompts)
    if chosen.language and chosen.language not in library.known():
        raise ValueError(
            f"--language {chosen.language}: known are {' '.join(sorted(library.known()))}"
        )
    if chosen.language:
        _choose(library, chosen, chosen.language)
    for check, model in (("entailment", args.entailment), ("judge", args.judge_model)):
        if check in args.checks and not model:
            flag = "--entailment" if check == "entailment" else "--judge-model"
            raise ValueError(f"--checks {check}: name the model with {flag}")
    for flag in ("embedder", "entailment"):
        name = getattr(args, flag)
        if name.startswith("hf:") and not Path(name.removeprefix("hf:")).is_dir():
            raise ValueError(f"--{flag} {name}: no such folder")
    token_counter(args.tokenizer_model)


class PromptCheck:
    """Checks that there are prompts for each document's language, called with each.

    A name of `--styles` may be known in one language only.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._library, self._chosen = Library(args.prompts), settings_of(args)
        self._fine: set[str] = {self._chosen.language} - {""}
        if not self._fine and all(self._error(code) is None for code in self._library.languages):
            self._fine = {"any"}

    def __call__(self, source: Source) -> None:
        """Check a document.

        Raises:
            ValueError: the flags name what its language has not; names the document.
        """
        if self._fine & {self._chosen.language or "any"}:
            return
        code = detect(source.text)
        if code not in self._fine:
            error = self._error(code)
            if error is not None:
                raise ValueError(f"{error}; {source.file} line {source.line} is in it") from error
            self._fine.add(code)

    def _error(self, code: str) -> ValueError | None:
        try:
            _choose(self._library, self._chosen, code)
        except ValueError as error:
            return error
        return None


def settings_of(args: argparse.Namespace) -> Settings:
    """Return how documents are rewritten.

    Raises:
        ValueError: a flag that cannot be.
    """
    if not 0 < args.length_bounds[0] < args.length_bounds[1]:
        raise ValueError(
            f"--length-bounds {args.length_bounds}: wanted LEAST MOST, LEAST below MOST"
        )
    most = args.max_new_tokens or 4 * args.chunk_tokens
    return Settings(
        task=args.task,
        rephrasings=args.rephrasings,
        chunk_tokens=args.chunk_tokens,
        excerpt_tokens=args.excerpt_tokens,
        language=args.language if args.task == "rewrite" else args.language or "en",
        styles=tuple(args.styles),
        perspectives=tuple(args.perspectives),
        sampler=Sampler(args.temperature, args.top_p, most),
        retry_temperature=args.retry_temperature,
        attempts=args.attempts,
        on_failure=args.on_failure,
        may_copy=args.may_copy,
        length_bounds=tuple(args.length_bounds),
        seed=args.seed,
    )


def token_counter(path: Path | None) -> CountTokens:
    """Return what counts tokens: a sentencepiece or Kimi tokenizer, an estimate without one.

    Raises:
        ValueError: the file is no tokenizer.
    """
    if path is None:
        return estimate_tokens
    from megatron_k2.chat.tokenizer import RANK_FILE, KimiTokenizer

    if path.is_dir() or path.name == RANK_FILE:
        try:
            kimi = KimiTokenizer(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer-model {path}: {error}") from error
        return lambda text: len(kimi.encode(text))
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--tokenizer-model {path}: {error}") from error
    return lambda text: len(model.encode(text))


def _check_ranges(args: argparse.Namespace) -> None:
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: must be from {least:g} to {most:g}"
            )


def _check_address(flag: str, url: str | None) -> None:
    if not url:
        return
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f"{flag} {url}: wanted an address such as http://localhost:8000/v1")


def _choose(library: Library, chosen: Settings, source_language: str) -> None:
    library.choose(
        "", 1, chosen.rephrasings, chosen.task, source_language, chosen.language, chosen.styles,
        chosen.perspectives,
    )  # fmt: skip
