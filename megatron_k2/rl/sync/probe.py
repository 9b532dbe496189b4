"""Log-probabilities of a fixed prompt: the trainer's by one forward, the engine's by its answers.

After each beginning of the prompt the engine is asked for its most probable next token, which any
backend can answer; it must be among the trainer's best and as probable. Ties then do no harm: both
tokens are as probable on both sides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model

from megatron_k2.engine.base import Engine, Request, Sampling, generate
from megatron_k2.rl.sync.fingerprint import Top

_NUM_IDS, _NUM_BEST = 8, 8


def probe_prompt(vocab_size: int) -> tuple[int, ...]:
    """Return a fixed prompt of eight ids, spread over the vocabulary."""
    return tuple((7919 * n + 13) % vocab_size for n in range(1, _NUM_IDS + 1))


@torch.no_grad()
def trainer_top(model: Any, vocab_size: int) -> tuple[Top, ...]:
    """Return the best next tokens after each beginning of the probe's prompt.

    Args:
        model: one chunk with all layers, wrapped or not; left as it was. With pipeline stages make
            the same from the schedule's own forward.
        vocab_size: without padding; the padding counts in the softmax, as in the training loss.

    Returns:
        For each beginning, eight tokens at most and their log-probabilities, best first.

    Collective: the model's forward, and all-gathers of logits over tensor and context parallelism.
    """
    device, group = next(model.parameters()).device, unwrap_model(model).pg_collection.cp
    prompt = probe_prompt(vocab_size)
    # Context parallelism halves the row of each rank; nothing sees what is added behind.
    length = -(-len(prompt) // (2 * group.size())) * 2 * group.size()
    ids = torch.tensor([[*prompt, *prompt * group.size()][:length]], device=device)
    given = {"ids": ids, "places": torch.arange(length, device=device)[None]}
    if group.size() > 1:
        given = get_batch_on_this_cp_rank(given, is_hybrid_cp=False, cp_group=group)
    with _evaluating(model):
        logits = model(given["ids"], given["places"], None, runtime_gather_output=True)[0]
    if group.size() > 1:
        logits = _in_order(logits, given["places"][0], group)
    log_probs = torch.log_softmax(logits[: len(prompt)].float(), -1)[:, :vocab_size]
    best = log_probs.topk(min(_NUM_BEST, vocab_size))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(tuple(zip(*pair, strict=True)) for pair in pairs)


async def engine_top(engine: Engine, vocab_size: int, version: int) -> tuple[Top, ...]:
    """Return the engine's most probable next token after each beginning."""
    prompt = probe_prompt(vocab_size)
    rules = Sampling(max_tokens=1, temperature=0.0)
    answers = await asyncio.gather(
        *(
            generate(engine, Request(f"sync-{version}-{length}", prompt[:length], rules))
            for length in range(1, len(prompt) + 1)
        )
    )
    return tuple(((one.ids[0], one.log_probs[0]),) for one in answers)


def _in_order(logits: torch.Tensor, places: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the rows [s / cp, vocabulary] of all context-parallel ranks by their places."""
    rows = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(rows, logits.contiguous(), group=group)
    where = [torch.empty_like(places) for _ in range(group.size())]
    torch.distributed.all_gather(where, places.contiguous(), group=group)
    return torch.cat(rows)[torch.cat(where).argsort()]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put every module into eval mode, and back into the one that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
