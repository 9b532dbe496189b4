"""An engine that says what a script says, and a live server over any engine, for tests.

Without a script it says ids that follow from the prompt and the seed, with log-probabilities that
follow from them, so that what comes over HTTP can be compared with the engine's own.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.types import ASGIApp

from megatron_k2.chat.format import AnswerParser, Message, Tools
from megatron_k2.chat.plain_text import PlainParser
from megatron_k2.engine.base import EngineFull, Piece, Request
from megatron_k2.engine.server.serving import bound

VOCABULARY = 256
END = 0  # of the tiny format
Script = Callable[[Sequence[int]], Sequence[int]]


class ScriptedEngine:
    """Says a script's ids one by one.

    ``slots`` run at once; ``waiting`` more may wait. What is held is in ``held``, what was ended
    early in ``aborted``.
    """

    def __init__(
        self,
        script: Script | None = None,
        slots: int = 8,
        waiting: int = 1000,
        step_s: float = 0.0,
        max_context: int = 4096,
    ) -> None:
        self.script, self.waiting, self.step_s = script, waiting, step_s
        self.max_context, self.weight_version = max_context, 7
        self.slots = asyncio.Semaphore(slots)
        self.held: set[str] = set()
        self.aborted: list[str] = []
        self.requests: list[Request] = []
        self.stopping: set[str] = set()
        self.closed = False

    def answer(self, request: Request) -> tuple[list[int], list[float]]:
        """Return the whole answer, with no regard to stop ids."""
        sampling = request.sampling
        text = repr((request.prompt, sampling.seed, sampling.temperature)).encode()
        roll = random.Random(hashlib.blake2b(text).digest())
        most = sampling.max_tokens
        if self.script is not None:
            ids = list(self.script(request.prompt))[:most]
        else:
            ids = [roll.randrange(1, VOCABULARY) for _ in range(most)]
        return ids, [-roll.random() for _ in ids]

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        if any(not 0 <= token < 1 << 20 for token in request.prompt):
            raise ValueError("an id is not in the vocabulary")
        if len(self.held) >= self.waiting:
            raise EngineFull("all slots are taken")
        self.held.add(request.id)
        self.requests.append(request)
        finished = False
        try:
            async with self.slots:
                for piece in self._pieces(request):
                    await asyncio.sleep(self.step_s)
                    if request.id in self.stopping:
                        piece = Piece((), (), (), finish_reason="abort")
                    finished = piece.finish_reason is not None
                    yield piece
                    if finished:
                        return
        finally:
            self.held.discard(request.id)
            if not finished:
                self.aborted.append(request.id)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        ids, log_probs = self.answer(request)
        sampling = request.sampling
        for at, (token, log_prob) in enumerate(zip(ids, log_probs, strict=True)):
            is_stop, is_last = token in sampling.stop_ids, at + 1 == len(ids)
            alternatives = [(token, log_prob)]
            alternatives += [(VOCABULARY + k, log_prob - k) for k in range(1, 30)]
            top = (tuple(alternatives[: sampling.top_log_probs]),) if sampling.top_log_probs else ()
            reason = "stop" if is_stop else "length" if is_last else None
            version = (self.weight_version,)
            routes = (((token % 4, 4), (5, token % 3)),)  # two layers, two experts each
            yield Piece((token,), (log_prob,), version, top, routes, finish_reason=reason)
            if is_stop:
                return

    async def abort(self, request_id: str) -> None:
        if request_id in self.held:
            self.stopping.add(request_id)

    async def close(self) -> None:
        self.closed = True


class ByteFormat:
    """Bytes as ids, messages as lines, 0 as the end."""

    stop_ids = (END,)

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        lines = []
        for message in messages:
            if message.get("role") not in ("system", "user", "assistant"):
                raise ValueError(f"role {message.get('role')!r} is not known")
            lines.append(f"{message['role']}: {message.get('content')}\n")
        return self.encode_text("".join(lines) + str(tools or ""))

    def parser(self, messages: Sequence[Message], tools: Tools | None = None) -> AnswerParser:
        return PlainParser(self.decode, self.stop_ids)

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode("utf-8", "replace")


def says(text: str) -> Script:
    """Return a script of text bytes and the end."""
    return lambda prompt: [*text.encode(), END]


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Run an application in a thread; yield its address with /v1."""
    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port}"
        httpx.get(f"{url}/health", timeout=20)  # the system holds it until the server is up
        try:
            yield f"{url}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
