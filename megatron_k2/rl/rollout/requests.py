"""A request to the engine, made again when the engine fails.

A request that fails begins again from the same prompt with the same seed, and what had come of it
is forgotten: its tokens are then those of a run in which nothing failed. A full engine is waited
for. What can never pass (a refused prompt, weights that were not confirmed) is not tried again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from megatron_k2.engine.base import Completion, Engine, EngineFull, Request
from megatron_k2.gym.base import unjudged
from megatron_k2.rl.rollout.metrics import Meter
from megatron_k2.rl.rollout.repetition import LoopWatch
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.slots import Slots
from megatron_k2.rl.rollout.stage import Unjudged
from megatron_k2.rl.sync.fingerprint import SyncRefused

LOOK_S = 0.1  # between looks at the slots while a request waits to be made again


class StaleTokens(RuntimeError):
    """A token comes from other weights than the batch is for."""


async def ask(
    engine: Engine,
    request: Request,
    slots: Slots,
    watch: Callable[[], LoopWatch | None],
    settings: RolloutSettings,
    meter: Meter,
) -> tuple[Completion, bool]:
    """Return what the engine said, and whether it looped.

    Args:
        engine: that generates.
        request: see ``Engine.stream``.
        slots: once they are shut, an abort is what was asked for.
        watch: makes a reader of the answer, what it said before included.
        settings: tries and waits.
        meter: counts them.

    Raises:
        Unjudged: the engine failed at every try, or refuses the request.
        StaleTokens: a token's version is not that of ``slots.rules``.
        SyncRefused: the weights are not confirmed.
    """
    failed, waited = 0, 0.0
    while slots.is_open or not (failed or waited):
        try:
            return await _read(engine, request, slots, watch())
        except (SyncRefused, StaleTokens):
            raise
        except EngineFull as error:
            if waited >= settings.full_patience_s:
                raise _given_up(request, error, "patience") from error
            meter.now.full_waits += 1
        except ValueError as error:
            said = f"the engine refused the request: {error}"
            raise Unjudged(unjudged(said), is_final=True) from error
        except Exception as error:
            failed += 1
            if failed == settings.max_tries:
                raise _given_up(request, error, f"{failed} tries") from error
            meter.now.retries += 1
        most = min(settings.longest_wait_s, settings.first_wait_s * 2.0 ** min(failed, 30))
        pause = random.uniform(0, most)
        waited += pause
        await _sleep(pause, slots)
    return Completion(request), False  # shut while it waited: it goes on in the next iteration


async def _sleep(pause_s: float, slots: Slots) -> None:
    """Wait, but not beyond the end of the iteration."""
    while pause_s > 0 and slots.is_open:
        await asyncio.sleep(min(pause_s, LOOK_S))
        pause_s -= LOOK_S


async def _read(
    engine: Engine, request: Request, slots: Slots, watch: LoopWatch | None
) -> tuple[Completion, bool]:
    completion = Completion(request)
    wanted = slots.rules.version
    stream: Any = engine.stream(request)
    async with aclosing(stream) as pieces:
        async for piece in pieces:
            if wanted is not None and any(version != wanted for version in piece.versions):
                raise StaleTokens(
                    f"request {request.id}: tokens of weights {sorted(set(piece.versions))} in a "
                    f"batch for weights {wanted}"
                )
            if watch is None:
                completion.add(piece)
                continue
            for one in piece.each():  # the answer ends with the token that completes a loop
                completion.add(one)
                if watch.feed(one.ids):
                    return completion, True
    if completion.finish_reason is None or (completion.finish_reason == "abort" and slots.is_open):
        raise RuntimeError("the engine ended the answer early")
    return completion, False


def _given_up(request: Request, error: Exception, after: str) -> Unjudged:
    said = f"{type(error).__name__}: {error}"
    return Unjudged(unjudged(f"the engine failed ({said}), given up after {after}"), is_final=True)
