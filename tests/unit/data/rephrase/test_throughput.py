"""Requests under way at once, against a server of known latency, by a clock of our own.

The clock of our own jumps to the next moment at which something happens, so that a loaded machine
does not matter: what is measured is whether as many requests are under way as may be.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_k2.data.rephrase.client import Client, Endpoint
from megatron_k2.data.rephrase.fidelity import Fidelity
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.parts import run_parts
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.rewriter import Rewriter
from megatron_k2.data.rephrase.settings import Settings
from megatron_k2.data.rephrase.sources import plan_parts
from tests.unit.data.rephrase.scripted_server import Plan, rewrite, serving
from tests.unit.data.rephrase.test_pipeline import TOOL, flags, write_corpus


class Jumping(selectors.DefaultSelector):
    """A selector that waits for nothing: it moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout is None:
            return super().select(None)
        if not found and timeout:
            self.now_s += timeout
        return found


class Inline(Executor):
    """Runs what is submitted at once."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))
        return future


class KnownLatency(httpx.AsyncBaseTransport):
    """Answers each request by the rule after a fixed time."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.num_requests = self.under_way = self.most_under_way = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.num_requests += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.latency_s)
        self.under_way -= 1
        user = json.loads(await request.aread())["messages"][-1]["content"]
        text = rewrite(re.findall(r"<passage>(.*)</passage>", user, re.DOTALL)[-1])
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice], "usage": {"total_tokens": 10}})


@pytest.mark.parametrize(
    ("num_documents", "num_sentences"), [(96, 4), (90, 12)], ids=["one_chunk", "chains_of_chunks"]
)
def test_as_many_requests_are_under_way_as_may_be(
    tmp_path: Path, num_documents: int, num_sentences: int
) -> None:
    concurrency, latency_s = 16, 2.0
    corpus = write_corpus(tmp_path / "in.jsonl", num_documents, num_sentences)
    transport = KnownLatency(latency_s)
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]

    async def work() -> None:
        budget = Budget()
        client = Client(Endpoint("http://x/v1", "rule"), Gate(concurrency), budget, 8, transport)
        fidelity = Fidelity(("numbers",), executor=Inline())
        settings = Settings(chunk_tokens=80, styles=("news",))
        rewriter = Rewriter(client, Library(), fidelity, settings)
        parts = plan_parts([corpus], 10, "text", None)
        assert await run_parts(parts, rewriter, tmp_path, "x", budget, 2 * concurrency) is None

    loop.run_until_complete(work())
    loop.close()
    assert transport.most_under_way == concurrency
    bound_s = transport.num_requests * latency_s / concurrency
    assert bound_s / selector.now_s >= 0.9, f"{selector.now_s:.2f} s, bound {bound_s:.2f} s"


@pytest.mark.evidence
@pytest.mark.parametrize("concurrency", [16, 64])
def test_throughput_is_nine_tenths_of_the_bound(tmp_path: Path, concurrency: int) -> None:
    """In real time, over sockets, between processes: needs a machine that is not busy."""
    latency_s, num_documents = 2.0, concurrency * 12
    corpus = write_corpus(tmp_path / "in.jsonl", num_documents, 5)
    with serving(Plan(latency_s=latency_s)) as server:
        arguments = flags(server, corpus, tmp_path / "out", "--concurrency", str(concurrency))
        subprocess.run([sys.executable, str(TOOL), *arguments], check=True, capture_output=True)
        seconds = server.times_s[-1] - server.times_s[0]
    assert server.most_under_way == concurrency
    share = num_documents / concurrency * latency_s / seconds
    print(f"{num_documents / seconds:.1f} chunks/s, {share:.3f} of the bound")
    assert share >= 0.9
