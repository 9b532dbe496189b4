"""Sends an answer, as one body or as server-sent events, while watching whether anybody reads it.

Status and headers go out with the first step: what an engine refuses still gets its 4xx. A client
that goes away ends the generation at once, whether it streams or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from megatron_k2.chat.format import TextDelta
from megatron_k2.engine.base import EngineFull
from megatron_k2.engine.server.asks import Ask
from megatron_k2.engine.server.choices import Delta, generate_all
from megatron_k2.engine.server.errors import ApiError
from megatron_k2.engine.server.said import Choice, Speaker, new_choice
from megatron_k2.engine.server.service import Service

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class Answering:
    """The response to a request for generation, an ASGI application.

    Args:
        service: engine, format, counters.
        ask: what is generated.
        speaker: says it.
    """

    def __init__(self, service: Service, ask: Ask, speaker: Speaker) -> None:
        self._service, self._ask, self._speaker = service, ask, speaker
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client is gone."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._service.counters.disconnected += 1
        finally:
            for task in (work, gone):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._service.answering(self._speaker.head.id, self._ask.num_choices):
                await (
                    self._stream(send) if self._ask.stream else self._whole(scope, receive, send)
                )
        except (ApiError, EngineFull, RuntimeError) as error:
            said = _api_error(error)
            self._service.counters.failed[said.status] += 1
            if self._started:  # too late for a status
                await self._send(send, said.body())
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await said.response()(scope, receive, send)

    async def _deltas(self) -> AsyncGenerator[Delta]:
        """Yield the steps, counted."""
        head, counters = self._speaker.head, self._service.counters
        counters.prompt_tokens += head.num_prompt_tokens
        deltas = generate_all(self._service.engine, self._service.chat_format, self._ask, head.id)
        async with aclosing(deltas):
            async for delta in deltas:
                head.num_tokens += len(delta.piece.ids)
                counters.generated_tokens += len(delta.piece.ids)
                yield delta

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        choices = [new_choice(index, self._ask) for index in range(self._ask.num_choices)]
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                _join(choices[delta.choice], delta)
        await JSONResponse(self._speaker.whole(choices))(scope, receive, send)
        self._service.counters.answered += 1

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                if not self._started:
                    await self._start(send)
                chunk = self._speaker.chunk(delta)
                if chunk is not None:
                    await self._send(send, chunk)
        if self._ask.include_usage:
            head = self._speaker.head
            await self._send(send, head.say([], usage=head.usage()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        self._service.counters.answered += 1

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
        for chunk in self._speaker.first():
            await self._send(send, chunk)

    @staticmethod
    async def _send(send: Send, value: dict[str, Any]) -> None:
        # ASCII, because some clients take U+2028 within a text for the end of a line.
        body = f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _join(choice: Choice, delta: Delta) -> None:
    choice.completion.add(delta.piece)
    choice.text += "".join(event.text for event in delta.events if isinstance(event, TextDelta))
    choice.finish_reason = delta.finish_reason
    choice.parsed = delta.parsed


def _api_error(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case EngineFull():
            return ApiError(429, f"too many requests: {error}", code="engine_full")
    return ApiError(500, f"the engine failed: {error}", code="engine_failed")


async def _disconnected(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
