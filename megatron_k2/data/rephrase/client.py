"""Any OpenAI-compatible server (vLLM, SGLang, a hosted one), asynchronously.

What can pass by itself (time-outs, lost connections, 408, 425, 429, 5xx, an unreadable body) is
tried again with jitter, after `Retry-After` if the server names it. A request refused for good
(400, 413, 422) fails its chunk; a wrong key, model or address stops the run, and so does a server
that answers nobody. Every try is written into the journal of its part before it is sent and after;
one whose outcome is not known (a time-out, an unreadable body, a lost connection) counts as the
most that it can cost.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import math
import os
import random
import ssl
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from megatron_k2.data.rephrase.answers import Reply, read_chat, read_vectors
from megatron_k2.data.rephrase.chunks import estimate_tokens
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.journal import ATTEMPT
from megatron_k2.data.rephrase.settings import Sampler

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
GATEWAY_TIMEOUTS = frozenset({408, 504, 524})  # the model may have answered all the same
REFUSED = frozenset({400, 413, 422})
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0  # of exponential waiting with full jitter
LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is down
RESERVED = 1.5  # times the estimate of a prompt's tokens is held back from the budget
CONNECTIONS_A_POOL = 16  # a pool looks through all of its connections for every request
MESSAGE_TOKENS = 8  # that chat templates put around a message, about


class ChunkRefused(Exception):
    """The server will never answer this request, or not while it answers others."""


class ServerGone(RuntimeError):
    """No request gets an answer."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an address; `key` is sent and never stored.

    `flags` are what errors name: of the key, of the model, of the address.
    """

    url: str
    model: str
    key: str = ""
    timeout_s: float = 300.0
    extra: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, str, str] = ("--api-key-env", "--server or --model", "--server")


@dataclass(frozen=True)
class Answer:
    """A model's answer and its tokens (estimated if the server counts none)."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    thought: bool  # thoughts before it were cut off
    message: dict[str, Any] = field(default_factory=dict)  # role, content, tool_calls if any


class Client:
    """Requests to one endpoint; several may share a gate and a budget."""

    def __init__(
        self,
        endpoint: Endpoint,
        gate: Gate,
        budget: Budget,
        max_tries: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.endpoint, self.gate, self.budget = endpoint, gate, budget
        self.max_tries = max_tries
        self.troubles: Counter[str] = Counter()
        self.stopped: Exception | None = None
        self._num_answers = 0
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        # The gate bounds what is under way, so the pools need no bound of their own.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=gate.most)
        context = ssl.create_default_context()
        self._pools = [
            httpx.AsyncClient(
                base_url=endpoint.url.rstrip("/") + "/",
                headers=headers,
                timeout=httpx.Timeout(endpoint.timeout_s, connect=min(30.0, endpoint.timeout_s)),
                limits=limits,
                transport=transport,
                verify=context,
            )
            for _ in range(math.ceil(gate.most / CONNECTIONS_A_POOL))
        ]
        self._next_pool = itertools.cycle(self._pools)

    async def close(self) -> None:
        """Close the connections."""
        for pool in self._pools:
            await pool.aclose()

    async def chat(self, messages: Sequence[dict[str, str]], sampler: Sampler, seed: int) -> Answer:
        """Return the model's answer to messages.

        Raises:
            ChunkRefused: this request gets no answer.
            BudgetSpent: a budget is spent.
            ServerGone: no request gets an answer.
            ValueError: wrong address, key or model.
        """
        return await self.complete(
            {
                "messages": list(messages),
                "temperature": sampler.temperature,
                "top_p": sampler.top_p,
                "max_tokens": sampler.max_tokens,
                "seed": seed,
            }
        )

    async def complete(self, fields: Mapping[str, Any]) -> Answer:
        """Return the model's answer to the fields of a request, `tools` may be among them.

        Args:
            fields: of /chat/completions, `messages` and `max_tokens` at least; the model's name
                and the endpoint's own fields are added.

        Raises:
            ChunkRefused, BudgetSpent, ServerGone, ValueError: as `chat`.
        """
        prompt = sum(map(_message_tokens, fields["messages"]))
        if fields.get("tools"):
            prompt += estimate_tokens(json.dumps(fields["tools"]))
        body = {"model": self.endpoint.model, **fields, **self.endpoint.extra}
        reply = await self._post("chat/completions", body, prompt, fields["max_tokens"])
        calls = json.dumps(reply.message["tool_calls"]) if "tool_calls" in reply.message else ""
        return Answer(
            reply.text,
            reply.finish_reason,
            reply.usage.get("prompt_tokens", prompt),
            reply.usage.get("completion_tokens", estimate_tokens(reply.text + calls)),
            reply.thought,
            reply.message,
        )

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of texts, as `chat` raises."""
        tokens = sum(map(estimate_tokens, texts))
        body = {"model": self.endpoint.model, "input": texts}
        return list((await self._post("embeddings", body, tokens, 0)).vectors)

    async def _post(
        self, path: str, body: dict[str, Any], prompt_tokens: int, most_tokens: int
    ) -> Reply:
        """Send a request until it is answered."""
        troubles: Counter[str] = Counter()
        answers_before = self._num_answers
        for attempt in range(self.max_tries):
            reply, kind, wait_s = await self._try(path, body, prompt_tokens, most_tokens)
            if reply is not None:
                self._num_answers += 1
                return reply
            troubles[kind] += 1
            self.troubles[kind] += 1
            if wait_s > LONGEST_RETRY_AFTER_S:
                break
            if attempt + 1 < self.max_tries:
                most_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
                await asyncio.sleep(wait_s + random.uniform(0, most_s))
        failed = ", ".join(f"{count} x {kind}" for kind, count in sorted(troubles.items()))
        if self._num_answers > answers_before:
            raise ChunkRefused(failed)
        raise self._stop(
            ServerGone(
                f"{self.endpoint.url} gave no answer in {sum(troubles.values())} tries ({failed}); "
                "run the same command again once it does"
            )
        )

    async def _try(
        self, path: str, body: dict[str, Any], prompt_tokens: int, most_tokens: int
    ) -> tuple[Reply | None, str, float]:
        """Send a request once; return its answer, or None, why, and how long to wait."""
        async with self.gate.passing() as epoch:
            if self.stopped is not None:
                raise self.stopped
            reserved = int(RESERVED * prompt_tokens) + most_tokens
            await self.budget.reserve(reserved)
            attempt = ATTEMPT.get()
            number = attempt.journal.sent(reserved) if attempt else 0
            reply, spent, kind, wait_s = None, reserved, "interrupted", 0.0
            try:
                response = await next(self._next_pool).post(path, json=body)
                wait_s = retry_after(response.headers.get("Retry-After"))
                if response.status_code == 200:
                    reply = _readable(response, body)
                    kind = "" if reply else "unreadable"
                    spent = (reply.total_tokens if reply else None) or reserved
                else:
                    kind = f"status {response.status_code}"
                    spent = reserved if response.status_code in GATEWAY_TIMEOUTS else 0
            except httpx.RequestError as error:
                kind = _kind(error)
                never_sent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                spent = 0 if never_sent else reserved
                return None, kind, 0.0
            finally:
                await self.budget.settle(reserved, spent)
                if attempt:
                    attempt.journal.settled(number, spent, kind)
            if reply:
                self.gate.answered()
            if response.status_code == 429:
                self.gate.refused(epoch, min(wait_s, LONGEST_RETRY_AFTER_S))
            if response.status_code not in PASSING | {200}:
                raise self._refusal(response)
            return reply, kind, wait_s

    def _refusal(self, response: httpx.Response) -> Exception:
        said = " ".join(response.text.split())[:200]
        if response.status_code in REFUSED:
            kind = f"status {response.status_code}"
            self.troubles[kind] += 1
            return ChunkRefused(f"{kind}: {said}")
        key, model, address = self.endpoint.flags
        flag = {401: key, 403: key, 404: model}.get(response.status_code, address)
        return self._stop(
            ValueError(
                f"{response.request.url}: status {response.status_code} {said}; check {flag}"
            )
        )

    def _stop(self, error: Exception) -> Exception:
        """Keep what stops the run, so that nothing more is sent."""
        self.stopped = self.stopped or error
        return self.stopped


def retry_after(value: str | None, now_s: float | None = None) -> float:
    """Return the seconds that a Retry-After header asks for, 0 without one.

    Args:
        value: a number of seconds or a date.
        now_s: of the clock; the system's if None.
    """
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, when - (time.time() if now_s is None else now_s))


def key_from(name: str) -> str:
    """Return the key that an environment variable holds, "" where there is none."""
    return os.environ.get(name, "")


def _message_tokens(message: Mapping[str, Any]) -> int:
    """Estimate the tokens of a message of a prompt, its tool calls included."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content)
    calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
    return estimate_tokens(text) + (estimate_tokens(calls) if calls else 0) + MESSAGE_TOKENS


def _readable(response: httpx.Response, body: dict[str, Any]) -> Reply | None:
    """Return the reply if it is what the interface promises."""
    try:
        value = response.json()
    except (ValueError, RecursionError):
        return None
    texts = body.get("input")
    return read_chat(value) if texts is None else read_vectors(value, len(texts))


def _kind(error: httpx.RequestError) -> str:
    """Name what went wrong on the way."""
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    if isinstance(error, httpx.TransportError):
        return f"connection {type(error).__name__}"
    return "unreadable"  # a body that cannot be unpacked
