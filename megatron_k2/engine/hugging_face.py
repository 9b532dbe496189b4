"""An engine over a transformers causal language model, for trying things.

It decodes its requests in turn, a token each, every one with its own key-value cache: an answer
does not depend on what else runs, and nothing is padded. Throughput is that of batch size 1; use
the ``local`` engine or vLLM for more. `model_from` reads a Hugging Face folder, or a GGUF file,
whose weights transformers expands to the dtype given.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_k2.engine.base import EngineFull, FinishReason, Piece, Request
from megatron_k2.engine.sampling import choose_tokens

PREFILL_CHUNK = 512  # prompt tokens a forward, so that other requests get their turn between


@dataclass
class _Running:
    """A request under way; ``pending`` are the ids that the model has not read yet."""

    request: Request
    random: random.Random
    pending: list[int]
    cache: Any = None
    num_generated: int = 0
    aborted: bool = False
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)


class HuggingFaceEngine:
    """Generates with a transformers model on one device.

    Args:
        model: a causal language model with a key-value cache.
        max_running: requests that are decoded in turn; others wait.
        max_waiting: requests that wait at most, beyond which `stream` raises ``EngineFull``.
    """

    def __init__(self, model: Any, max_running: int = 4, max_waiting: int = 256) -> None:
        self._model = model.eval()
        self._max_running, self._max_waiting = max_running, max_waiting
        # transformers renamed the argument and the output's field within version 5.
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._vocab_size: int = model.config.vocab_size
        self._max_context: int = model.config.max_position_embeddings
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._stepper: asyncio.Task[None] | None = None

    @property
    def max_context(self) -> int:
        """Prompt and answer together have at most this many tokens."""
        return self._max_context

    @property
    def weight_version(self) -> int:
        """Return 0: these weights do not change."""
        return 0

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate; see ``Engine.stream``."""
        self._check(request)
        if len(self._waiting) >= self._max_waiting:
            raise EngineFull(f"{self._max_waiting} requests are waiting already")
        one = _Running(request, random.Random(request.sampling.seed), list(request.prompt))
        self._waiting.append(one)
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._run())
        try:
            while True:
                piece = await one.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._forget(one)

    async def abort(self, request_id: str) -> None:
        """End a request; see ``Engine.abort``."""
        for one in [*self._running, *self._waiting]:
            if one.request.id == request_id and not one.aborted:
                self._forget(one)
                one.pieces.put_nowait(Piece((), (), (), finish_reason="abort"))

    async def close(self) -> None:
        """Abort all requests and wait for the forward pass under way."""
        for one in [*self._running, *self._waiting]:
            await self.abort(one.request.id)
        if self._stepper is not None:
            await asyncio.gather(self._stepper, return_exceptions=True)

    def _check(self, request: Request) -> None:
        length = len(request.prompt)
        if not length:
            raise ValueError("the prompt is empty")
        if length >= self._max_context:
            raise ValueError(f"the prompt has {length} tokens, the context {self._max_context}")
        wrong = next((i for i in request.prompt if not 0 <= i < self._vocab_size), None)
        if wrong is not None:
            raise ValueError(f"prompt id {wrong} is not in the vocabulary of {self._vocab_size}")

    def _forget(self, one: _Running) -> None:
        """Take a request out; a step under way finishes and its token is not sent."""
        one.aborted = True
        if one in self._waiting:
            self._waiting.remove(one)
        if one in self._running:
            self._running.remove(one)

    async def _run(self) -> None:
        """Give each request a step in turn until there are none."""
        while self._running or self._waiting:
            while self._waiting and len(self._running) < self._max_running:
                self._running.append(self._waiting.popleft())
            for one in list(self._running):
                if one.aborted:
                    continue
                try:
                    piece = await asyncio.to_thread(self._step, one)
                except Exception as error:  # the request's own iterator raises it
                    one.pieces.put_nowait(error)
                    self._forget(one)
                    continue
                if piece is not None and not one.aborted:
                    one.pieces.put_nowait(piece)
                    if piece.finish_reason is not None:
                        self._forget(one)

    @torch.inference_mode()
    def _step(self, one: _Running) -> Piece | None:
        """Read some of the prompt, or generate a token; None while the prompt is not read."""
        read, one.pending = one.pending[:PREFILL_CHUNK], one.pending[PREFILL_CHUNK:]
        out = self._model(
            input_ids=torch.tensor([read], device=self._model.device),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: one.cache},
        )
        one.cache = out[self._cache_name]
        if one.pending:
            return None
        sampling = one.request.sampling
        logits = out.logits[:, -1].float()
        (chosen,) = choose_tokens(logits, [sampling], [one.random.random()], self._vocab_size)
        one.pending = [chosen.id]
        one.num_generated += 1
        reason: FinishReason | None = None
        if chosen.id in sampling.stop_ids:
            reason = "stop"
        elif (
            one.num_generated >= sampling.max_tokens
            or len(one.request.prompt) + one.num_generated >= self._max_context
        ):
            reason = "length"
        tops = (chosen.top,) if sampling.top_log_probs else ()
        return Piece((chosen.id,), (chosen.log_prob,), (0,), tops, finish_reason=reason)


def model_from(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return model and tokenizer of a Hugging Face folder or a GGUF file.

    Raises:
        ValueError: it holds none that transformers reads.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, extra = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            where, local_files_only=True, dtype=dtype, **extra
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--model {path}: {str(error).strip().splitlines()[0]}") from error
    return model, tokenizer
