"""Small models for the engine's tests, and their own full forward pass as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_k2.engine.base import Completion, Request, Sampling
from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.scheduler import Limits
from tests.unit.model.tiny import build_model, tiny_config

VOCABULARY = 97
LIMITS = Limits(max_context=128, cache_tokens=1024, max_running=8, step_tokens=64)


def build(seed: int = 0, **changes: Any) -> Any:
    """Return a tiny K2 model (YaRN at factor 32) whose logits and routers spread widely."""
    model = build_model(tiny_config(**changes), VOCABULARY)
    return randomise_(model, seed)


def randomise_(model: Any, seed: int) -> Any:
    """Draw all weights anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Return random ids."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def request_of(name: str, length: int, **rules: Any) -> Request:
    """Return a request with a random prompt; greedy unless asked otherwise."""
    fields = dict(max_tokens=8, temperature=0.0) | rules
    return Request(name, prompt_of(length), Sampling(**fields))


def run(core: LocalCore, requests: Sequence[Request]) -> dict[str, Completion]:
    """Add requests and step until all are done."""
    for request in requests:
        core.add(request)
    return drain(core, requests)


def drain(core: LocalCore, requests: Sequence[Request]) -> dict[str, Completion]:
    """Step until there is nothing to do."""
    found = {request.id: Completion(request) for request in requests}
    while core.has_work:
        for name, piece in core.step():
            found[name].add(piece)
    return found


@torch.no_grad()
def full_log_probs(model: Any, tokens: Sequence[int]) -> Tensor:
    """Return fp32 [tokens, padded vocabulary] by Megatron's modules, without any cache."""
    ids = torch.tensor([tokens])
    logits = model(ids, torch.arange(ids.shape[1])[None], None)[0]
    return torch.log_softmax(logits.float(), -1)


def largest_error(model: Any, answer: Completion) -> float:
    """Return the largest difference of an answer's alternatives from the full forward pass."""
    prompt = answer.request.prompt
    expected = full_log_probs(model, [*prompt, *answer.ids])
    error = 0.0
    for index, (token, log_prob, top) in enumerate(
        zip(answer.ids, answer.log_probs, answer.top, strict=True)
    ):
        row = expected[len(prompt) - 1 + index]
        error = max(error, abs(log_prob - float(row[token])))
        error = max(error, *(abs(value - float(row[one])) for one, value in top))
    return error
