"""The ``local`` backend: the Megatron model of this process behind the Engine protocol.

``LocalEngine`` runs the core's steps in one thread of its own, one after the other while there is
work, and hands the pieces to each request's iterator; the event loop stays free. Several steps may
make a turn of the thread: waking a reader for each token costs a small model as much as the token
does. Commands (new requests, aborts, new weights, pause) take effect between two turns. Requests
whose iterator is closed are aborted, so that a client that goes away leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megatron_k2.engine.base import Piece, Request
from megatron_k2.engine.core import LocalCore, UnderWay

Answer = asyncio.Queue[Piece | BaseException]
ENDED_SHARE = 8  # a turn ends once more than one in so many of its answers has: places are wanted


class LocalEngine:
    """``Engine`` over a ``LocalCore``. All methods are called from one event loop.

    Args:
        core: the synchronous engine; nobody else may step it.
        num_threads: torch threads of the engine's thread; None keeps torch's setting.
        turn: steps at most before readers get their pieces, joined, and commands take effect. It
            ends early once more than an eighth of its answers have ended; never by the clock.
    """

    def __init__(self, core: LocalCore, num_threads: int | None = None, turn: int = 1) -> None:
        self._core, self._turn = core, turn
        self._answers: dict[str, Answer] = {}
        self._left: list[str] = []  # ended by their readers while a turn may run
        self._stepper: asyncio.Task[None] | None = None
        self._free = asyncio.Lock()  # held while a turn or a change of weights runs
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._closed = False

        def start() -> None:
            if num_threads is not None:
                torch.set_num_threads(num_threads)

        self._thread = ThreadPoolExecutor(1, "k2-engine", initializer=start)

    @property
    def max_context(self) -> int:
        """Prompt and answer together have at most this many tokens."""
        return self._core.limits.max_context

    @property
    def weight_version(self) -> int:
        """Return the version of the weights that the next token is sampled from."""
        return self._core.weight_version

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._answers)

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate; see ``Engine.stream``."""
        if self._closed:
            raise RuntimeError("the engine is closed")
        answer: Answer = asyncio.Queue()
        async with self._free:
            self._let_go()
            self._core.add(request)
            self._answers[request.id] = answer
        try:
            self._wake()
            while True:
                piece = await answer.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._leave(request.id, answer)

    async def abort(self, request_id: str) -> None:
        """End a request; see ``Engine.abort``."""
        if request_id in self._answers:
            async with self._free:
                self._core.abort(request_id)
            self._wake()

    async def update_weights(
        self, version: int, change: Callable[[], None], under_way: UnderWay = "keep"
    ) -> None:
        """Run ``change`` between two turns, in the engine's thread; see ``LocalCore``."""
        async with self._free:
            await self._run(self._core.update_weights, version, change, under_way)

    async def between_steps(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function of the core in the engine's thread while no turn runs."""
        async with self._free:
            return await self._run(function, *args)

    async def pause(self) -> None:
        """Return when no turn runs; none starts before ``resume``."""
        self._resumed.clear()
        async with self._free:
            pass

    async def resume(self) -> None:
        """Go on after ``pause``."""
        self._resumed.set()

    async def close(self) -> None:
        """Abort all requests and free what the engine holds."""
        if self._closed:
            return
        self._closed = True
        self._resumed.set()
        if self._stepper is not None:
            self._stepper.cancel()
            await asyncio.gather(self._stepper, return_exceptions=True)
        async with self._free:
            self._core.close()
        for answer in self._answers.values():
            answer.put_nowait(Piece((), (), (), finish_reason="abort"))
        self._thread.shutdown()

    def _take_turn(self) -> tuple[list[tuple[str, Piece]], Exception | None]:
        """Run steps in the engine's thread; return what each request got, and what ended them."""
        found: dict[str, list[Piece]] = {}
        ended = 0
        failure: Exception | None = None
        for _ in range(self._turn):
            try:
                pieces = self._core.step()
            except Exception as error:
                failure = error
                break
            for request_id, piece in pieces:
                found.setdefault(request_id, []).append(piece)
                ended += piece.finish_reason is not None
            if ENDED_SHARE * ended > len(found) or not self._core.has_work:
                break
        return [(name, Piece.joined(each)) for name, each in found.items()], failure

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the engine's thread, to its end even if the caller is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def _wake(self) -> None:
        """See that steps run."""
        if not self._closed and (self._stepper is None or self._stepper.done()):
            self._stepper = asyncio.create_task(self._step_while_work())

    async def _step_while_work(self) -> None:
        """Run steps until there is nothing to do; an error ends every request with it."""
        while self._core.has_work or self._left:
            async with self._free:
                self._let_go()
            await self._resumed.wait()
            async with self._free:
                if not self._resumed.is_set() or not self._core.has_work:
                    continue
                pieces, error = await self._run(self._take_turn)
                if error is not None:
                    self._core.clear()
            for request_id, piece in pieces:
                if request_id in self._answers:
                    self._answers[request_id].put_nowait(piece)
            if error is not None:  # the iterators of all that had not ended raise it
                for answer in self._answers.values():
                    answer.put_nowait(error)

    def _leave(self, request_id: str, answer: Answer) -> None:
        """Forget a request whose iterator ends; if it still runs, it is aborted before a turn."""
        if self._answers.get(request_id) is answer:
            del self._answers[request_id]
        if not self._closed:
            self._left.append(request_id)
            self._wake()

    def _let_go(self) -> None:
        """Abort the requests whose readers left. The caller holds the lock."""
        for request_id in self._left:
            self._core.drop(request_id)
        self._left.clear()
