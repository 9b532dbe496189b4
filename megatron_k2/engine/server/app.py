"""The routes of the server, an ASGI application over a `Service`.

OpenAI's: /v1/models, /v1/chat/completions, /v1/completions. vLLM's: /health, /pause, /resume.
Ours: /weight_version. /metrics is Prometheus text. A body must say that it is JSON: what a web page
may send to this machine without asking first, it may not.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.server.access import Access
from megatron_k2.engine.server.answering import Answering
from megatron_k2.engine.server.asks import Ask, read_chat, read_completion
from megatron_k2.engine.server.chat import Chat
from megatron_k2.engine.server.completions import Completions
from megatron_k2.engine.server.errors import ApiError
from megatron_k2.engine.server.fields import Fields, wrong
from megatron_k2.engine.server.said import Speaker
from megatron_k2.engine.server.service import Service

MAX_BODY_BYTES = 32 << 20  # a megabyte of arguments and 128 k token ids as JSON, many times over

Read = Callable[[Fields, ChatFormat, int], Ask]
Speak = Callable[[Ask, ChatFormat, str], Speaker]


def make_app(
    service: Service, api_key: str = "", max_body_bytes: int = MAX_BODY_BYTES
) -> Starlette:
    """Return the application.

    Args:
        service: the engine; closed when the application shuts down.
        api_key: that requests must show, except for /health; empty for none, and then only
            requests addressed to this machine by name are answered.
        max_body_bytes: a larger body gets 413.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.engine.close()

    routes = Routes(service, max_body_bytes)
    return Starlette(
        routes=[
            Route("/v1/models", routes.models),
            Route("/v1/models/{model:path}", routes.models),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/weight_version", routes.weight_version),
            Route("/pause", routes.pause, methods=["POST"]),
            Route("/resume", routes.resume, methods=["POST"]),
        ],
        middleware=[Middleware(Access, api_key=api_key)],
        exception_handlers={
            HTTPException: _http_error,
            ApiError: _api_error,
            Exception: _failure,
        },
        lifespan=lifespan,
    )


class Routes:
    """The endpoints."""

    def __init__(self, service: Service, max_body_bytes: int) -> None:
        self._service, self._max_body_bytes = service, max_body_bytes

    async def chat(self, request: Request) -> Any:
        """Answer messages."""
        return await self._generate(request, read_chat, Chat)

    async def completions(self, request: Request) -> Any:
        """Go on from text or token ids."""
        return await self._generate(request, read_completion, Completions)

    async def _generate(self, request: Request, read: Read, speak: Speak) -> Any:
        service = self._service
        try:
            fields = Fields(await read_json(request, self._max_body_bytes))
            self._know(fields.text("model"))
            ask = read(fields, service.chat_format, service.engine.max_context)
        except ApiError as error:
            service.counters.failed[error.status] += 1
            raise
        return Answering(service, ask, speak(ask, service.chat_format, service.model))

    async def models(self, request: Request) -> Response:
        """List the one model, or describe it by name."""
        model = {
            "id": self._service.model,
            "object": "model",
            "created": 0,
            "owned_by": "megatron-k2",
            "max_model_len": self._service.engine.max_context,
        }
        if "model" in request.path_params:
            self._know(request.path_params["model"])
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """Say that the server runs."""
        return JSONResponse({"status": "paused" if self._service.paused else "ok"})

    async def weight_version(self, request: Request) -> Response:
        """Tell the version of the weights that the next token is sampled from."""
        return JSONResponse({"weight_version": self._service.engine.weight_version})

    async def pause(self, request: Request) -> Response:
        """Keep new requests waiting; answered when none is under way."""
        body = Fields(await read_json(request, self._max_body_bytes, may_be_empty=True))
        mode = body.take("mode", "wait")
        if mode not in ("wait", "abort"):
            raise wrong("mode", mode, "wait or abort")
        body.end(())
        await self._service.pause(abort=mode == "abort")
        return await self.weight_version(request)

    async def resume(self, request: Request) -> Response:
        """End a pause."""
        await read_json(request, self._max_body_bytes, may_be_empty=True)
        self._service.resume()
        return await self.weight_version(request)

    async def metrics(self, request: Request) -> Response:
        """Tell counters as Prometheus text."""
        counters, service = self._service.counters, self._service
        values: dict[str, int] = {
            "requests_answered_total": counters.answered,
            "requests_disconnected_total": counters.disconnected,
            "prompt_tokens_total": counters.prompt_tokens,
            "generated_tokens_total": counters.generated_tokens,
            "requests_under_way": service.num_under_way,
            "weight_version": service.engine.weight_version,
        }
        for status, count in sorted(counters.failed.items()):
            values[f'requests_failed_total{{status="{status}"}}'] = count
        lines = "".join(f"megatron_k2_{name} {value}\n" for name, value in values.items())
        return PlainTextResponse(lines)

    def _know(self, model: str) -> None:
        if model != self._service.model:
            raise ApiError(
                404,
                f"model {model!r} is not served here; {self._service.model!r} is",
                "model",
                "model_not_found",
            )


async def read_json(request: Request, max_bytes: int, may_be_empty: bool = False) -> Any:
    """Return a request's body, read as far as the limit.

    Raises:
        ApiError: it is too long or no JSON, or does not say that it is.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type {kind or '(none)'}: wanted application/json")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise ApiError(413, f"the body is longer than {max_bytes} bytes")
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    if may_be_empty and not body:
        return {}
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, said).response()


async def _failure(request: Request, error: Exception) -> Response:
    return ApiError(500, f"the server failed: {type(error).__name__}").response()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()
