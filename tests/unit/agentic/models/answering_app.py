"""An OpenAI-compatible server that says what a scripted run said, found by ``Question.key``.

A script's inputs are never sent, so the server cannot follow a script; it has the recording of a
scripted run. The role is no field of a request either: each is tried. A question that is not in the
recording gets 400, which a run counts as refused.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.models.recorded import Answers, read_recordings
from megatron_k2.agentic.models.scripted import ROLES

KINDS = (*ROLES, "judge-2", "judge-3")


def keys_of(body: dict[str, Any]) -> Iterator[str]:
    """Yield what the keys of a request's question can be."""
    for kind in KINDS:
        yield Question(
            kind,
            tuple(body["messages"]),
            tuple(body.get("tools", ())),
            body["seed"],
            body["temperature"],
            body["max_tokens"],
        ).key


def app(answers: Answers, served: Counter[str]) -> Starlette:
    """Return the server's application; ``served`` counts what it did."""

    async def chat(request: Request) -> JSONResponse:
        line = next((answers[key] for key in keys_of(await request.json()) if key in answers), None)
        if line is None or "refused" in line:
            served["refused"] += 1
            return JSONResponse({"error": {"message": "not in the recording"}}, 400)
        served["answered"] += 1
        usage = {name: line[name] for name in ("prompt_tokens", "completion_tokens")}
        reason = "tool_calls" if "tool_calls" in line["message"] else "stop"
        choice = {"index": 0, "message": line["message"], "finish_reason": reason}
        return JSONResponse({"model": line["model"], "choices": [choice], "usage": usage})

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


@contextmanager
def answering(recordings: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Serve a recording from a thread; yields the address with its version, and the counts."""
    served: Counter[str] = Counter()
    made = app(read_recordings([recordings]), served)
    server = uvicorn.Server(uvicorn.Config(made, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1", served
    finally:
        server.should_exit = True
        thread.join(10)
