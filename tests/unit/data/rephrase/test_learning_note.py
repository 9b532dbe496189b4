"""A German mathematical text becomes an English learning note: translation, retry, provenance."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from megatron_k2.data.rephrase.client import Client, Endpoint
from megatron_k2.data.rephrase.fidelity import Fidelity
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.journal import Journal
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.rewriter import Rewriter
from megatron_k2.data.rephrase.settings import Settings
from megatron_k2.data.rephrase.sources import Source

TEXT = (
    "Die Gleichung $x^2 = 49$ hat genau 2 Lösungen, denn das Quadrat einer Zahl ist nie negativ. "
    "Sie sind $x = 7$ und $x = -7$, und ihre Summe ist 0."
)
NOTE = (
    "Problem: solve $x^2 = 49$.\n1. The square of a number is never negative, so the equation has "
    "exactly two solutions.\n2. They are $x = 7$ and $x = -7$, since $7 * 7 = 49$.\n"
    "3. Their sum is 0."
)


class Answers(httpx.AsyncBaseTransport):
    """Gives one answer after the other."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.bodies = list(answers), []  # type: ignore[var-annotated]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(await request.aread()))
        choice = {"message": {"content": self.answers.pop(0)}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})


def rewritten(folder: Path, transport: Answers, settings: Settings) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        client = Client(Endpoint("http://x/v1", "m"), Gate(4), Budget(), 2, transport)
        rewriter = Rewriter(client, Library(), Fidelity(), settings)
        journal = Journal(folder / "journal" / "p.jsonl", "run")
        records, _ = await rewriter.rewrite(Source("f", 1, TEXT, "d", "hash"), journal)
        journal.close()
        await client.close()
        return records

    return asyncio.run(work())


def test_a_note_is_translated_may_add_a_step_and_is_retried_when_a_value_changed(
    tmp_path: Path,
) -> None:
    german = "Die Gleichung hat 2 Lösungen, und das sind die Zahlen, die mit dem Quadrat gehen."
    transport = Answers(german, NOTE.replace("x = -7", "x = -6"), NOTE)
    settings = Settings(task="learning-note", language="en", length_bounds=(0.3, 4.0))
    (record,) = rewritten(tmp_path, transport, settings)
    assert record["text"] == NOTE
    assert record["prompt"]["style"] == "note"
    assert (record["source"]["language"], record["prompt"]["language"]) == ("de", "en")
    (span,) = record["spans"]
    assert span["rejected"] == {"language": 1, "formulae": 1}
    verdicts = {verdict["check"]: verdict["passed"] for verdict in span["verdicts"]}
    assert verdicts["numbers"] is verdicts["formulae"] is True
    assert verdicts["names"] is verdicts["clauses"] is None  # skipped, and said to be
    seeds = [body["seed"] for body in transport.bodies]
    assert len(set(seeds)) == 3 and span["seed"] == seeds[2]
    assert [body["temperature"] for body in transport.bodies] == [0.0, 0.7, 0.7]
    assert "Write in English, translating" in transport.bodies[0]["messages"][0]["content"]
