"""An engine behind HTTP: vLLM, SGLang or our own server, by token ids on /v1/completions.

Text is never sent nor read: the prompt is a list of ids, and the answer's ids come back as vLLM's
``token_ids``, or as "token_id:N" among the log-probabilities. A request is tried again only while
none of its tokens has come; an abort closes the connection, on which servers stop generating.
Shown against our own server, and vLLM 0.32 on a CPU (tests/vllm); SGLang was not run. Their
log-probabilities must be those of the unchanged logits (vLLM: ``--logprobs-mode raw_logprobs``, its
default). They do not tell the version of their weights: whoever changes them sets
``weight_version``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx

from megatron_k2.engine.base import EngineFull, FinishReason, Piece, Request

PASSING = frozenset({408, 429, 500, 502, 503, 504})  # may be answered when asked again
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0  # of exponential waiting with full jitter
TOKEN = "token_id:"  # vLLM's prefix of ids among log-probabilities
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class _Again(Exception):
    """A try that failed before its first token, and may pass when it is made again."""

    def __init__(self, message: str, is_full: bool = False) -> None:
        super().__init__(message)
        self.is_full = is_full


class OpenAIEngine:
    """Generates by a server; made by `connect`.

    Args:
        client: with the server's address and key.
        model: the server's name of it.
        max_context: of the model.
        max_tries: of a request until its first token.
        routed_experts: ask for each token's; known to our own server only.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str,
        max_context: int,
        max_tries: int = 5,
        routed_experts: bool = False,
    ) -> None:
        self._client, self._model, self._max_context = client, model, max_context
        self._max_tries, self._routed_experts = max_tries, routed_experts
        self._queues: dict[str, asyncio.Queue[Piece | Exception]] = {}
        self._weight_version = 0

    @classmethod
    async def connect(
        cls,
        url: str,
        model: str = "",
        api_key: str = "",
        timeout_s: float = 600.0,
        routed_experts: bool = False,
    ) -> OpenAIEngine:
        """Ask a server for its model.

        Args:
            url: with /v1.
            model: the server's name of it; empty where it has one only.
            api_key: empty for none.
            timeout_s: without any byte of a request under way.
            routed_experts: see the class.

        Raises:
            ValueError: no server is there, it does not let us in, or has no such model.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(timeout_s, connect=min(30.0, timeout_s))
        client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, limits=limits
        )
        try:
            response = await client.get("models")
            response.raise_for_status()
            models = {one["id"]: one.get("max_model_len") for one in response.json()["data"]}
            name = model or (next(iter(models)) if len(models) == 1 else "")
            if name not in models:
                raise ValueError(f"model {model!r} is not one of {', '.join(models)}")
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            await client.aclose()
            raise ValueError(f"{url}: {error}") from error
        engine = cls(client, name, models[name] or 1 << 31, routed_experts=routed_experts)
        await engine.read_weight_version()
        return engine

    @property
    def max_context(self) -> int:
        """Prompt and answer together have at most this many tokens."""
        return self._max_context

    @property
    def weight_version(self) -> int:
        """Return the version that the server told last, or that was set."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._weight_version = version

    async def read_weight_version(self) -> None:
        """Ask our own server for its version; other servers do not tell."""
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            response = await self._client.get(self._client.base_url.join("../weight_version"))
            if response.status_code == 200:
                self._weight_version = int(response.json()["weight_version"])

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate; see ``Engine.stream``.

        Raises:
            RuntimeError: the server cannot be reached, or fails after the first token.
        """
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._queues[request.id] = queue
        reader = asyncio.create_task(self._read(request, queue))
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._queues[request.id]
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def abort(self, request_id: str) -> None:
        """End a request; see ``Engine.abort``."""
        if request_id in self._queues:
            self._queues[request_id].put_nowait(Piece((), (), (), finish_reason="abort"))

    async def close(self) -> None:
        """Abort all requests and close the connections."""
        for request_id in list(self._queues):
            await self.abort(request_id)
        await self._client.aclose()

    async def _read(self, request: Request, queue: asyncio.Queue[Piece | Exception]) -> None:
        """Fill a request's queue."""
        body = self._body(request)
        for attempt in range(self._max_tries):
            try:
                await self._try(body, request, queue)
                return
            except _Again as error:
                if attempt + 1 == self._max_tries:
                    said = f"{error}, after {self._max_tries} tries"
                    queue.put_nowait(EngineFull(said) if error.is_full else RuntimeError(said))
                    return
            except Exception as error:  # the request's own iterator raises it
                queue.put_nowait(error)
                return
            most_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
            await asyncio.sleep(random.uniform(0, most_s))

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # the stop ids are exactly those asked for
            "logprobs": sampling.top_log_probs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if self._routed_experts:
            body["return_routed_experts"] = True
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        return body

    async def _try(
        self, body: dict[str, Any], request: Request, queue: asyncio.Queue[Piece | Exception]
    ) -> None:
        """Send a request once and pass on what comes."""
        begun = False
        try:
            async with self._client.stream("POST", "completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, (await response.aread())[:500])
                async for data in _events(response):
                    piece = self._piece(json.loads(data), request)
                    if piece is None:
                        continue
                    begun = True
                    queue.put_nowait(piece)
                    if piece.finish_reason is not None:
                        return
            error = "the server ended an answer early"
        except (httpx.TransportError, httpx.StreamError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        raise RuntimeError(f"{error}, after the first token") if begun else _Again(error)

    def _piece(self, chunk: dict[str, Any], request: Request) -> Piece | None:
        """Return what a chunk says; None if it has no choice."""
        if "error" in chunk:
            raise RuntimeError(f"the server failed: {chunk['error']}")
        if not chunk.get("choices"):
            return None
        choice = chunk["choices"][0]
        told = choice.get("logprobs") or {}
        ids = choice.get("token_ids")
        if ids is None:
            ids = [_token_id(name) for name in told.get("tokens") or []]
        log_probs = told.get("token_logprobs") or []
        if len(ids) != len(log_probs):
            raise RuntimeError(
                f"the server sent {len(ids)} ids, {len(log_probs)} log-probabilities"
            )
        versions = choice.get("weight_versions") or [self._weight_version] * len(ids)
        if versions:
            self._weight_version = max(self._weight_version, versions[-1])
        reason = choice.get("finish_reason")
        return Piece(
            tuple(ids),
            tuple(log_probs),
            tuple(versions),
            _alternatives(told.get("top_logprobs") or [], request.sampling.top_log_probs),
            _nested(choice.get("routed_experts") or []),
            finish_reason=REASONS.get(reason, "abort") if reason is not None else None,
        )


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events; httpx's own lines end within a text, at U+2028."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield data


def _refusal(status: int, body: bytes) -> Exception:
    """Return the error of a status that is not 200."""
    said = " ".join(body.decode("utf-8", "replace").split())
    if status in PASSING:
        return _Again(f"status {status}: {said}", is_full=status == 429)
    if status in (400, 413, 422):
        return ValueError(f"the server refused the request: {said}")
    return RuntimeError(f"status {status}: {said}")


def _alternatives(
    told: list[dict[str, float] | None], most: int
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Return a token's alternatives, best first; servers may add the token itself."""
    if not most:
        return ()
    rows = [[(_token_id(name), value) for name, value in (one or {}).items()] for one in told]
    return tuple(tuple(sorted(row, key=lambda pair: -pair[1])[:most]) for row in rows)


def _nested(value: Any) -> Any:
    """Return lists of lists as tuples of tuples."""
    return tuple(map(_nested, value)) if isinstance(value, list) else value


def _token_id(name: str) -> int:
    """Return the id that a token's name says.

    Raises:
        RuntimeError: it says none.
    """
    if not name.startswith(TOKEN):
        raise RuntimeError(
            f"the server sent the token {name!r} and no ids; it must know return_token_ids"
        )
    return int(name.removeprefix(TOKEN))
