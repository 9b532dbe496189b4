"""An OpenAI-compatible application whose models are functions, for tools that ask servers."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_k2.gym.judging import ScriptedJudge


def answering(models: Mapping[str, ScriptedJudge]) -> Starlette:
    """Return an application with a model a name."""

    async def chat(request: Request) -> JSONResponse:
        body = await request.json()
        text = await models[body["model"]].ask(body["messages"], body["seed"])
        message = {"role": "assistant", "content": text}
        return JSONResponse({"choices": [{"message": message, "finish_reason": "stop"}]})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({})

    return Starlette(
        routes=[Route("/health", health), Route("/v1/chat/completions", chat, methods=["POST"])]
    )
