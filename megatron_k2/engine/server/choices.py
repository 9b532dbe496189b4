"""The choices of a request, generated side by side and read token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from megatron_k2.chat.format import (
    CallArguments,
    CallBegin,
    ChatFormat,
    Event,
    Parsed,
    ReasoningDelta,
    TextDelta,
)
from megatron_k2.engine.base import Engine, Piece, Request
from megatron_k2.engine.server.asks import Ask
from megatron_k2.engine.server.errors import ApiError
from megatron_k2.engine.server.text import StopStrings

QUEUE = 64  # deltas that wait for a slow client, beyond which its generation waits


@dataclass(frozen=True)
class Delta:
    """What a step adds to a choice.

    ``finish_reason`` and ``parsed``, the whole answer, come with the last one.
    """

    choice: int
    events: tuple[Event, ...]
    piece: Piece
    finish_reason: str | None = None
    parsed: Parsed | None = None


async def generate_all(
    engine: Engine, chat_format: ChatFormat, ask: Ask, request_id: str
) -> AsyncGenerator[Delta]:
    """Yield the steps of all choices as they come; closing the iterator aborts what is under way.

    Raises:
        ApiError, EngineFull: what ``Engine.stream`` refuses; the other choices are aborted.
    """
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(QUEUE)

    async def put(choice: int) -> None:
        request = Request(
            f"{request_id}-{choice}", ask.prompts[choice // ask.n], ask.sampling_of(choice)
        )
        try:
            async with aclosing(_choice(engine, chat_format, ask, request, choice)) as deltas:
                async for delta in deltas:
                    await queue.put(delta)
            await queue.put(None)
        except ValueError as error:
            await queue.put(ApiError(400, f"prompt: {error}", "prompt"))
        except Exception as error:  # the reader of the queue raises it
            await queue.put(error)

    tasks = [asyncio.create_task(put(choice)) for choice in range(ask.num_choices)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _choice(
    engine: Engine, chat_format: ChatFormat, ask: Ask, request: Request, choice: int
) -> AsyncGenerator[Delta]:
    """Yield the steps of one choice; a stop string ends it and aborts its generation."""
    parser, stops = ask.parser(chat_format), StopStrings(ask.stop)
    told: list[Event] = []
    # An engine's iterator need not be a generator.
    pieces = engine.stream(request)
    async with aclosing(pieces) as stream:  # type: ignore[type-var]
        async for piece in stream:
            events: list[Event] = []
            num_ids = 0
            for token in piece.ids:
                num_ids += 1
                events += stops.cut(parser.feed([token]))
                if stops.hit:
                    break
            reason: str | None = "stop" if stops.hit else piece.finish_reason
            parsed = None
            if reason is not None and not stops.hit:
                held, parsed = parser.finish()
                events += stops.cut(held)
                events += [] if stops.hit else stops.finish()
            told += events
            if stops.hit:
                reason, parsed = "stop", Parsed(_message(told))
            yield Delta(choice, tuple(events), _first(piece, num_ids), reason, parsed)
            if reason is not None:
                return


def _message(events: Sequence[Event]) -> dict[str, object]:
    """Return the message of an answer that a stop string ended."""
    message: dict[str, object] = {
        "role": "assistant",
        "content": "".join(event.text for event in events if isinstance(event, TextDelta)),
    }
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = [
        {
            "id": begin.id,
            "type": "function",
            "function": {
                "name": begin.name,
                "arguments": "".join(
                    more.text
                    for more in events
                    if isinstance(more, CallArguments) and more.index == begin.index
                ),
            },
        }
        for begin in events
        if isinstance(begin, CallBegin)
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _first(piece: Piece, num_ids: int) -> Piece:
    """Return the first ids of a piece; what follows a stop string is not told."""
    if num_ids == len(piece.ids):
        return piece
    return Piece(
        piece.ids[:num_ids],
        piece.log_probs[:num_ids],
        piece.versions[:num_ids],
        piece.top[:num_ids],
        piece.routed_experts[:num_ids],
    )
