"""The local engine's async front: streams, departures, pauses and weights between steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_k2.engine.base import EngineFull, Piece, Request, Sampling, generate
from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.local import LocalEngine
from megatron_k2.engine.sampling import choose_tokens
from tests.unit.engine.small_models import LIMITS, build, request_of, run

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def model(single_process: None) -> Any:
    torch.set_num_threads(1)
    return build()


def with_engine(  # type: ignore[no-untyped-def]
    model: Any, use: Callable[[LocalEngine, LocalCore], Awaitable[None]], turn: int = 1, **more: Any
):
    """Run ``use`` on a fresh engine and close it."""

    async def body() -> None:
        core = LocalCore(model, replace(LIMITS, **more))
        engine = LocalEngine(core, num_threads=1, turn=turn)
        try:
            await asyncio.wait_for(use(engine, core), 60)
        finally:
            await engine.close()

    asyncio.run(body())


def test_streams_are_the_cores_answers_and_departures_free_their_blocks(model: Any) -> None:
    asked = [request_of(f"s{n}", n + 2, max_tokens=6 + n % 5) for n in range(30)]
    expected = run(LocalCore(model, LIMITS), asked)

    async def use(engine: LocalEngine, core: LocalCore) -> None:
        async def leave(name: str, after: int) -> None:
            stream = engine.stream(request_of(name, 25, max_tokens=90))
            async for _ in stream:
                after -= 1
                if not after:
                    break
            await stream.aclose()

        leavers = [leave(f"gone{n}", n + 1) for n in range(10)]
        *answers, _ = await asyncio.gather(
            *(generate(engine, one) for one in asked), asyncio.gather(*leavers)
        )
        for one, answer in zip(asked, answers, strict=True):
            assert answer.ids == expected[one.id].ids
        await engine.pause()  # the last departure is carried out between steps
        await engine.resume()
        while core.has_work or engine.num_requests:
            await asyncio.sleep(0.01)
        assert core.cache.num_free == core.cache.num_blocks

    with_engine(model, use)


def test_a_turn_of_many_steps_says_the_same_in_fewer_pieces(model: Any) -> None:
    asked = [request_of(f"s{n}", n + 2, max_tokens=20 + n) for n in range(6)]
    expected = run(LocalCore(model, LIMITS), asked)

    async def use(engine: LocalEngine, core: LocalCore) -> None:
        async def read(request: Request) -> list[Piece]:
            return [piece async for piece in engine.stream(request)]

        for request, pieces in zip(asked, await asyncio.gather(*map(read, asked)), strict=True):
            answer = expected[request.id]
            singles = [one for piece in pieces for one in piece.each()]
            assert [one.ids for one in singles] == [(token,) for token in answer.ids]
            assert Piece.joined(singles) == Piece.joined(pieces)
            assert Piece.joined(pieces).log_probs == pytest.approx(answer.log_probs, abs=1e-6)
            assert len(pieces) <= len(answer.ids) / 2
            assert [one.finish_reason for one in singles[:-1]] == [None] * (len(singles) - 1)
            assert pieces[-1].finish_reason == "length"

    with_engine(model, use, turn=8)


def test_a_command_waits_for_a_turn_and_no_longer(model: Any) -> None:
    async def use(engine: LocalEngine, core: LocalCore) -> None:
        began = core.step
        steps: list[int] = []
        core.step = lambda: (steps.append(1), time.sleep(0.01), began())[-1]  # type: ignore[method-assign, func-returns-value]
        answer = asyncio.create_task(generate(engine, request_of("a", 5, max_tokens=90)))
        while len(steps) < 9:
            await asyncio.sleep(0.001)
        await engine.pause()
        paused = len(steps)
        assert paused % 8 == 0 and paused < 90
        await engine.update_weights(7, lambda: None)
        assert len(steps) == paused
        await engine.resume()
        assert set((await answer).versions) == {0, 7}

    with_engine(model, use, turn=8)


def test_an_error_spares_the_answers_that_ended_before_it_in_its_turn(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(engine: LocalEngine, core: LocalCore) -> None:
        steps, step = [0], core.step

        def fifth_fails() -> list[tuple[str, Piece]]:
            steps[0] += 1
            return step() if steps[0] < 5 else 1 / 0  # type: ignore[return-value]

        monkeypatch.setattr(core, "step", fifth_fails)
        short = generate(engine, request_of("short", 4, max_tokens=3))
        others = [generate(engine, request_of(f"o{n}", 5 + n, max_tokens=30)) for n in range(7)]
        found = await asyncio.gather(short, *others, return_exceptions=True)
        monkeypatch.undo()
        assert not isinstance(found[0], BaseException) and len(found[0].ids) == 3
        assert [type(one) for one in found[1:]] == [ZeroDivisionError] * 7
        assert len((await generate(engine, request_of("after", 4))).ids) == 8

    with_engine(model, use, turn=8)


def test_a_cancelled_reader_and_an_abort_end_their_requests(model: Any) -> None:
    async def use(engine: LocalEngine, core: LocalCore) -> None:
        task = asyncio.create_task(generate(engine, request_of("a", 5, max_tokens=100)))
        other = asyncio.create_task(generate(engine, request_of("b", 5, max_tokens=100)))
        await asyncio.sleep(0.05)
        task.cancel()
        await engine.abort("b")
        await engine.abort("unknown")
        assert (await other).finish_reason == "abort"
        with pytest.raises(asyncio.CancelledError):
            await task
        again = await generate(engine, request_of("a", 5, max_tokens=2))
        assert len(again.ids) == 2

    with_engine(model, use)


def test_a_pause_holds_tokens_back_and_weights_change_between_them(model: Any) -> None:
    async def use(engine: LocalEngine, core: LocalCore) -> None:
        pieces: list[Piece] = []

        async def read() -> None:
            async for piece in engine.stream(request_of("a", 5, max_tokens=60)):
                pieces.append(piece)

        task = asyncio.create_task(read())
        while not pieces:
            await asyncio.sleep(0.001)
        await engine.pause()
        await asyncio.sleep(0.02)
        held = len(pieces)
        await asyncio.sleep(0.1)
        assert len(pieces) == held < 60
        await engine.update_weights(7, lambda: None)
        assert engine.weight_version == 7
        await engine.resume()
        await task
        versions = [piece.versions[0] for piece in pieces]
        assert versions == [0] * held + [7] * (60 - held)

    with_engine(model, use)


def test_refusals_reach_the_caller_and_an_error_every_reader(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(engine: LocalEngine, core: LocalCore) -> None:
        await engine.pause()
        waiting = [asyncio.create_task(generate(engine, request_of(f"w{n}", 4))) for n in range(3)]
        await asyncio.sleep(0.02)
        with pytest.raises(EngineFull):
            await generate(engine, request_of("x", 4))
        with pytest.raises(ValueError, match="under way"):
            await generate(engine, request_of("w1", 4))
        with pytest.raises(ValueError, match="empty"):
            await generate(engine, request_of("e", 0))
        monkeypatch.setattr(core, "step", lambda: 1 / 0)
        await engine.resume()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in found] == [ZeroDivisionError] * 3
        monkeypatch.undo()
        assert len((await generate(engine, request_of("after", 4))).ids) == 8

    with_engine(model, use, max_waiting=3)


def test_close_aborts_everything_and_refuses_more(model: Any) -> None:
    async def body() -> None:
        engine = LocalEngine(LocalCore(model, LIMITS), num_threads=1)
        task = asyncio.create_task(generate(engine, request_of("a", 5, max_tokens=100)))
        await asyncio.sleep(0.05)
        await engine.close()
        assert (await task).finish_reason == "abort"
        with pytest.raises(RuntimeError, match="closed"):
            await generate(engine, request_of("b", 5))
        await engine.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (dict(), [0.4, 0.3, 0.2, 0.1]),
        (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (dict(top_p=0.39), [1, 0, 0, 0]),
        (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (dict(temperature=0.5, top_k=3, top_p=0.8), [16 / 25, 9 / 25, 0, 0]),
        (dict(temperature=0.0), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(rule: dict[str, Any], expected: Any) -> None:
    count = 1000
    order = torch.tensor([2, 0, 3, 1])  # the most probable token has the id 2
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rules = [Sampling(**(dict(max_tokens=1) | rule))] * count
    uniforms = [(index + 0.5) / count for index in range(count)]
    choices = choose_tokens(logits.expand(count, -1), rules, uniforms, 4)
    shares = torch.bincount(torch.tensor([one.id for one in choices]), minlength=4) / count
    assert (shares[order] - torch.tensor(expected)).abs().max() <= 1 / count
    assert choices[0].log_prob == pytest.approx(float(logits[choices[0].id]), abs=1e-6)
