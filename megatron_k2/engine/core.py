"""The local engine's synchronous core: requests in, pieces out, one ``step()`` at a time.

Deterministic: what it returns follows from the commands and their order. Threads and waiting are
local.py's, other ranks ranks.py's. Weights change only inside ``update_weights``, between steps;
requests under way then go on over the latents they have (``keep``), as K2's partial rollouts do,
or are computed again from their first token (``recompute``).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal

import torch

from megatron_k2.engine.base import FinishReason, Piece, Request
from megatron_k2.engine.batch import make_batch
from megatron_k2.engine.cache import LatentCache
from megatron_k2.engine.forward import Reduce, forward
from megatron_k2.engine.sampling import Choice, choose_tokens
from megatron_k2.engine.scheduler import Limits, Scheduler, Sequence
from megatron_k2.engine.weights import ModelWeights, bind_weights

UnderWay = Literal["keep", "recompute"]


class LocalCore:
    """A Megatron K2 model that continues many prompts at once.

    Attributes:
        weight_version: of the weights that the next step uses.
    """

    def __init__(
        self,
        model: Any,
        limits: Limits,
        *,
        vocab_size: int | None = None,
        weight_version: int = 0,
        record_routes: bool = False,
        reduce: Reduce | None = None,
        share_ids: Callable[[list[int]], list[int]] = lambda ids: ids,
    ) -> None:
        """Bind the model's weights and allocate the cache.

        Args:
            model: one GPTModel chunk of the local K2 spec with all layers; in eval mode or not,
                its modules are not run.
            limits: bounds of the engine.
            vocab_size: ids from here on pad the vocabulary; None: none does.
            weight_version: of the weights as they are.
            record_routes: return the experts of each token (``Piece.routed_experts``): those of the
                position that it was predicted at, expert layers in order.
            reduce: the groups that share the work, see ranks.py.
            share_ids: makes one rank's choice every rank's.

        Raises:
            ValueError: the model has what the engine does not compute, or is cut over ranks that
                ``reduce`` does not name.

        Collective: see ``bind_weights``.
        """
        self._model, self.limits = model, limits
        self._reduce, self._share_ids = reduce or Reduce(), share_ids
        self._weights = bind_weights(model, limits.max_context)
        self._check_cut()
        first = self._weights.embedding
        width = model.config.kv_lora_rank + model.config.qk_pos_emb_head_dim
        self.cache = LatentCache(
            len(self._weights.layers), width, limits.cache_tokens, first.dtype, first.device
        )
        self.scheduler = Scheduler(limits, self.cache)
        self.vocab_size = vocab_size or model.vocab_size
        self.weight_version = weight_version
        self._record_routes = record_routes
        self._aborted: list[tuple[str, Piece]] = []

    @property
    def weights(self) -> ModelWeights:
        """Return what the next step computes with, for a sync to compare."""
        return self._weights

    @property
    def has_work(self) -> bool:
        """Tell whether ``step`` would return something or advance a request."""
        return bool(len(self.scheduler) or self._aborted)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that can never run."""
        prompt = request.prompt
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= self.limits.max_context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with at least one of the answer the engine "
                f"holds {self.limits.max_context} (max_context)"
            )
        outside = next((one for one in prompt if not 0 <= one < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"prompt id {outside} is not in the vocabulary of {self.vocab_size}")
        if self.scheduler.find(request.id) is not None:
            raise ValueError(f"request id {request.id!r} is under way already")

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: see ``check``.
            EngineFull: too many requests wait.
        """
        self.check(request)
        seed = request.sampling.seed
        self.scheduler.add(request, random.SystemRandom().getrandbits(64) if seed is None else seed)

    def abort(self, request_id: str) -> None:
        """End a request; the next step returns its last piece. Unknown ids are ignored."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._aborted.append((request_id, Piece((), (), (), finish_reason="abort")))

    def drop(self, request_id: str) -> None:
        """End a request that nobody waits for: no last piece. Unknown ids are ignored."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self.scheduler.remove(sequence)
        self._aborted = [one for one in self._aborted if one[0] != request_id]

    def clear(self) -> None:
        """Forget all requests, without a last piece, and every kept page."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.remove(sequence)
        self.scheduler.kept.forget_all()
        self._aborted.clear()

    def update_weights(
        self, version: int, change: Callable[[], None], under_way: UnderWay = "keep"
    ) -> None:
        """Change the weights between two steps.

        Args:
            version: of the new weights.
            change: changes the model's parameters, in place or not.
            under_way: ``keep`` what running requests have cached, or ``recompute`` it.

        Raises:
            ValueError: ``under_way`` is neither.

        Collective: as ``bind_weights``.
        """
        if under_way not in ("keep", "recompute"):
            raise ValueError(f"under_way {under_way!r} must be keep or recompute")
        change()
        self._weights = bind_weights(self._model, self.limits.max_context)
        self.weight_version = version
        self.scheduler.new_weights()
        if under_way == "recompute":
            self.scheduler.recompute_all()

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Piece]]:
        """Advance requests; return (request id, piece) of those with something new.

        Collective: with several ranks, as ``forward``.
        """
        pieces, self._aborted = self._aborted, []
        planned = self.scheduler.plan()
        if not planned:
            return pieces
        first = self._weights.embedding
        width = self.cache.pages[0].size(1)
        batch = make_batch([span for _, span in planned], width, first.device)
        routes: list[torch.Tensor] | None = [] if self._record_routes else None
        logits = forward(self._weights, self.cache, batch, self._reduce, routes)
        for sequence, span in planned:
            sequence.cached = span.end
        done = [sequence for sequence, span in planned if span.wants_logits]
        if not done:
            return pieces
        rules = [one.request.sampling for one in done]
        uniforms = [one.source.random() for one in done]
        choices = choose_tokens(logits, rules, uniforms, self.vocab_size)
        ids = self._share_ids([choice.id for choice in choices])
        choices = [dataclasses.replace(c, id=i) for c, i in zip(choices, ids, strict=True)]
        chosen: list[Any] = [()] * len(done)
        if routes:
            chosen = torch.stack(routes, 1).tolist()
        for sequence, choice, experts in zip(done, choices, chosen, strict=True):
            pieces.append((sequence.request.id, self._piece(sequence, choice, experts)))
        return pieces

    def _piece(self, sequence: Sequence, choice: Choice, experts: Any) -> Piece:
        """Append a token to its sequence and end the sequence if that was the last."""
        sequence.tokens.append(choice.id)
        rules = sequence.request.sampling
        reason: FinishReason | None = None
        if choice.id in rules.stop_ids:
            reason = "stop"
        elif (
            sequence.generated >= rules.max_tokens
            or len(sequence.tokens) >= self.limits.max_context
        ):
            reason = "length"
        if reason is not None:
            self.scheduler.remove(sequence)
        return Piece(
            ids=(choice.id,),
            log_probs=(choice.log_prob,),
            versions=(self.weight_version,),
            top=(choice.top,) if rules.top_log_probs else (),
            routed_experts=(tuple(map(tuple, experts)),) if self._record_routes else (),
            finish_reason=reason,
        )

    def close(self) -> None:
        """Forget all requests and free the cache."""
        self.clear()
        self.cache.pages.clear()

    def _check_cut(self) -> None:
        """Raise ValueError where the model is cut over ranks that do not work together here."""
        config = self._model.config
        tp = 1 if self._reduce.tp is None else self._reduce.tp.size()
        experts = 1 if self._reduce.experts is None else self._reduce.experts.size()
        if tp != config.tensor_model_parallel_size:
            raise ValueError(
                f"--tensor-model-parallel-size {config.tensor_model_parallel_size}: build the "
                "engine on every rank with engine.ranks.RankedCore"
            )
        cut = config.expert_model_parallel_size * (config.expert_tensor_parallel_size or tp)
        if config.num_moe_experts and experts != cut:
            raise ValueError(
                f"--expert-model-parallel-size {config.expert_model_parallel_size}: build the "
                "engine on every rank with engine.ranks.RankedCore"
            )
