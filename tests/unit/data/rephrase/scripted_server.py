"""An OpenAI-compatible server for tests: a rule for rewriting, and faults that are planned.

It runs in a thread of the test's process. Whether a request fails, and how, follows from its
content, so that two runs meet the same faults; a request that failed on the way succeeds when it is
repeated. Everything that was served is counted by kind.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TRANSPORT = ("status 429", "status 500", "timeout", "connection", "unreadable")
ANSWERS = ("empty", "truncated", "language", "leak", "repetition", "numbers")
NAMES = ("Anna Berg", "Tom Wells", "Ivo Marsh", "Lena Holt", "Karl Finch", "Ruth Dale")
THINGS = ("mills", "bridges", "barns", "towers", "wells", "gates")
PLACES = ("Harlow", "Denby", "Tarvin", "Elsdon", "Ripley", "Kelso")
VERBS = ("built", "bought", "sold", "repaired", "painted", "measured")
SENTENCE = re.compile(r"In (\d+), (\w+ \w+) (\w+) (\d+) (\w+) near the town of (\w+)\.")
GERMAN = "Das ist ein Satz in einer anderen Sprache, und er hat mit dem Text nichts zu tun. " * 3


def make_text(number: int, num_sentences: int) -> str:
    """Return a document of sentences that the rule can rewrite, in paragraphs of five."""
    sentences = []
    for index in range(num_sentences):
        roll = int.from_bytes(hashlib.blake2b(f"{number} {index}".encode(), digest_size=8).digest())
        pick = [roll >> shift for shift in (0, 8, 16, 24, 32, 40)]
        sentences.append(
            f"In {1200 + pick[0] % 800}, {NAMES[pick[1] % 6]} {VERBS[pick[2] % 6]} "
            f"{2 + pick[3] % 97} {THINGS[pick[4] % 6]} near the town of {PLACES[pick[5] % 6]}."
        )
    paragraphs = [" ".join(sentences[i : i + 5]) for i in range(0, num_sentences, 5)]
    return "\n\n".join(paragraphs)


def rewrite(passage: str) -> str:
    """Return the faithful rewriting of a passage of such a document."""
    found = [m.groups() for m in SENTENCE.finditer(passage)]
    return " ".join(
        f"{count} {things} near {place}, a town, were {verb} by {name} in {year}."
        for year, name, verb, count, things, place in found
    )


@dataclass
class Plan:
    """Shares of 100 for each kind of fault, and how long an answer takes."""

    transport: Sequence[str] = ()
    answers: Sequence[str] = ()
    percent_each: int = 4
    latency_s: float = 0.0
    retry_after: str = "0.05"


@dataclass
class ScriptedServer:
    """What the tests look at: requests by kind, prompts in order, most under way at once."""

    plan: Plan
    port: int = 0
    served: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    times_s: list[float] = field(default_factory=list)  # of arrivals and answers
    _failed: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection."""
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
        raw = await reader.readexactly(size)
        self.under_way += 1
        self.times_s.append(time.perf_counter())
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.plan.latency_s:
                await asyncio.sleep(self.plan.latency_s)
            return await self._answer(json.loads(raw), raw, reader, writer)
        finally:
            self.under_way -= 1
            self.times_s.append(time.perf_counter())

    async def _answer(
        self,
        body: dict[str, Any],
        raw: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        fault = self._transport_fault(raw)
        self.served[fault or "answered"] += 1
        if fault == "timeout":
            await reader.read()  # until the client has had enough
            return False
        if fault == "connection":
            writer.transport.abort()
            return False
        if fault == "unreadable":
            self._send(writer, 200, b'{"choices": [{"mess')
        elif fault:
            headers = f"Retry-After: {self.plan.retry_after}\r\n" if "429" in fault else ""
            self._send(writer, int(fault.split()[1]), b"busy", headers)
        else:
            self.bodies.append(body)
            self._send(writer, 200, json.dumps(self._completion(body)).encode())
        await writer.drain()
        return True

    def _transport_fault(self, raw: bytes) -> str:
        digest = hashlib.blake2b(raw, digest_size=8)
        if digest.hexdigest() in self._failed:
            return ""
        fault = self._chosen(self.plan.transport, int.from_bytes(digest.digest()))
        if fault:
            self._failed.add(digest.hexdigest())
        return fault

    def _chosen(self, kinds: Sequence[str], roll: int) -> str:
        """Return the fault that a number falls on, "" for most."""
        index = roll % 100 // self.plan.percent_each
        return kinds[index] if index < len(kinds) else ""

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        passage = (
            body["messages"][-1]["content"].rsplit("<passage>", 1)[1].rsplit("</passage>", 1)[0]
        )
        text, finish = rewrite(passage), "stop"
        kind = self._chosen(self.plan.answers, body["seed"])
        if kind:
            self.served[kind] += 1
        match kind:
            case "empty":
                text = "  \n"
            case "truncated":
                text, finish = text[: len(text) // 2], "length"
            case "language":
                text = GERMAN
            case "leak":
                text = "Sure, here is the rewritten passage:\n\n" + text
            case "repetition":
                text = text + (" and so on and so forth as was said" * 12)
            case "numbers":
                text = re.sub(r"\d{4}", lambda match: str(int(match[0]) + 2), text, count=1)
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
        }
        return {"choices": [choice], "usage": usage}

    @staticmethod
    def _send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


@contextmanager
def serving(plan: Plan, kind: type[ScriptedServer] = ScriptedServer) -> Iterator[ScriptedServer]:
    """Run a server, of a class of one's own if need be, in a thread."""
    server = kind(plan)
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def run() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0, backlog=1024)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        listening.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
