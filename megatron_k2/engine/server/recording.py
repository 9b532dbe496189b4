"""Records the answers of a model, and gives them again without one.

A record is a JSON line: the hash of a request's body, its path, the status, and the answer. It is
for pipelines whose prompts are the same in every run (a seed decides all): their tests then run on
what a real model said. Streams are not recorded. A request that was never recorded gets 404: no
answer is invented.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_k2.engine.server.access import Access
from megatron_k2.engine.server.app import MAX_BODY_BYTES, read_json
from megatron_k2.engine.server.errors import ApiError

UNSTABLE = ("id", "created")  # fields of an answer that differ each time


def request_hash(path: str, body: Any) -> str:
    """Return what tells a request apart: its path and its fields in any order."""
    text = json.dumps([path, body], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Recorder:
    """Passes requests on and appends their answers to a file.

    Args:
        app: what answers.
        path: JSONL file.
    """

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self._app, self._path = app, path
        self._seen = set(read_records(path)) if path.exists() else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and record the answer if it is a model's."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        asked, answered, status = bytearray(), bytearray(), 0

        async def hear() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def say(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            answered.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, hear, say)
        if status == 200:
            self._record(scope["path"], bytes(asked), bytes(answered))

    def _record(self, path: str, asked: bytes, answered: bytes) -> None:
        body = json.loads(asked or b"{}")
        key = request_hash(path, body)
        if key in self._seen or body.get("stream") or not path.startswith("/v1/"):
            return
        answer = {
            name: value for name, value in json.loads(answered).items() if name not in UNSTABLE
        }
        line = json.dumps({"request": key, "path": path, "answer": answer}, ensure_ascii=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._seen.add(key)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return recorded answers by the hash of their request; lines without one are comments.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        values = [json.loads(line) for line in lines if line.strip()]
        return {value["request"]: value["answer"] for value in values if "request" in value}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else error  # which names the file again
        raise ValueError(f"--replay {path}: {why}") from error


def make_replay_app(records: dict[str, dict[str, Any]], model: str, api_key: str = "") -> Starlette:
    """Return an application that gives recorded answers.

    Args:
        records: of `read_records`.
        model: name that it has.
        api_key: as of `make_app`.
    """

    async def answer(request: Request) -> Response:
        try:
            body = await read_json(request, MAX_BODY_BYTES)
        except ApiError as error:
            return error.response()
        found = records.get(request_hash(request.url.path, body))
        if found is None:
            return ApiError(404, "this request was not recorded", code="not_recorded").response()
        return JSONResponse(found)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model"}]})

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/{path:path}", answer, methods=["POST"]),
        ],
        middleware=[Middleware(Access, api_key=api_key)],
    )
