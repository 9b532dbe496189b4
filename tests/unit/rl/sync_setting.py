"""A trainer and an engine of one tiny K2 model for the tests of weight sync."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.model import ModelShape, shape_from_config
from megatron_k2.engine.base import Completion, Request, Sampling, generate
from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.local import LocalEngine
from megatron_k2.rl.sync.disk import LocalFolderReceiver
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.live import LiveWeights
from tests.unit.engine.small_models import LIMITS, VOCABULARY, full_log_probs, prompt_of
from tests.unit.model.tiny import tiny_fields


def config_of(
    num_moe_experts: int = 7, vocab_size: int = VOCABULARY, **changes: Any
) -> tuple[dict[str, Any], ModelShape]:
    """Return config.json of a tiny model, and its shape."""
    fields = tiny_fields(
        multi_latent_attention=True, swiglu=True, vocab_size=vocab_size, rotary_base=50000,
        max_position_embeddings=512, init_method_std=0.02, num_experts=num_moe_experts,
        norm_epsilon=1e-6, **changes,
    )  # fmt: skip
    config = config_from_arguments(fields)
    return config, shape_from_config(config)


CONFIG, SHAPE = config_of()


class Setting:
    """An engine over ``model``, its gate and its receiver."""

    def __init__(self, model: Any, dtype: str = "F32", shape: ModelShape = SHAPE) -> None:
        self.core = LocalCore(model, LIMITS)
        self.engine = LocalEngine(self.core, num_threads=1)
        self.gate = GatedEngine(self.engine)
        self.weights = LiveWeights([model], shape, dtype)
        self.receiver = LocalFolderReceiver(self.engine, self.core, self.weights)


def with_setting(
    model: Any,
    use: Callable[[Setting], Awaitable[None]],
    dtype: str = "F32",
    shape: ModelShape = SHAPE,
) -> None:
    """Run ``use`` with a fresh engine over ``model`` and close it."""

    async def body() -> None:
        setting = Setting(model, dtype, shape)
        try:
            await asyncio.wait_for(use(setting), 60)
        finally:
            await setting.engine.close()

    asyncio.run(body())


async def answer(engine: Any, name: str = "a", max_tokens: int = 4) -> Completion:
    """Return a greedy answer to a fixed prompt."""
    return await generate(engine, Request(name, prompt_of(6), Sampling(max_tokens, 0.0)))


def difference(model: Any, found: Completion) -> float:
    """Return the largest difference of log-probabilities from a model's full forward; infinite if
    the model's own greedy tokens are others."""
    prompt = found.request.prompt
    rows = full_log_probs(model, [*prompt, *found.ids])[len(prompt) - 1 :]
    error = 0.0
    for row, token, log_prob in zip(rows, found.ids, found.log_probs, strict=False):
        if int(row.argmax()) != token:
            return float("inf")
        error = max(error, abs(float(row[token]) - log_prob))
    return error
