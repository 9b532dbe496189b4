"""The whole tool against a scripted server: faults, concurrency, budgets, kills, resumption."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.data.rephrase.command import run
from megatron_k2.data.rephrase.flags import parser
from tests.unit.data.rephrase.scripted_server import (
    ANSWERS,
    TRANSPORT,
    Plan,
    ScriptedServer,
    make_text,
    rewrite,
    serving,
)

TOOL = Path(__file__).resolve().parents[4] / "tools" / "rephrase_data.py"


def write_corpus(path: Path, num_documents: int, num_sentences: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_documents):
            record = {"text": make_text(number, num_sentences), "id": f"d{number}"}
            file.write(json.dumps(record) + "\n")
    return path


def flags(server: ScriptedServer, corpus: Path, output: Path, *extra: str) -> list[str]:
    return [
        *("--input", str(corpus), "--output", str(output), "--server", server.url),
        *("--model", "rule", "--styles", "encyclopaedia", "--documents-per-part", "5", "--quiet"),
        *extra,
    ]


def rephrase(*arguments: str) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        return run(parser().parse_args(arguments))


def published(output: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((output / "parts").glob("*.jsonl")))


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in published(output).splitlines()]


def test_every_fault_is_met_and_accounted_for_and_nothing_is_lost_or_twice(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 18, 15)
    with serving(Plan(TRANSPORT, ANSWERS, percent_each=5)) as server:
        failed = rephrase(
            *flags(server, corpus, tmp_path / "out", "--rephrasings", "2", "--chunk-tokens", "64"),
            *("--timeout-s", "4", "--attempts", "8", "--concurrency", "24"),
        )
    assert failed == []
    assert all(server.served[kind] > 0 for kind in (*TRANSPORT, *ANSWERS)), server.served
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejected_by_check"] == {
        kind: server.served[kind] for kind in report["rejected_by_check"]
    }
    assert set(report["rejected_by_check"]) == set(ANSWERS)
    troubles = Counter(report["failed_requests"])
    lost = sum(count for kind, count in troubles.items() if kind.startswith("connection"))
    assert lost == server.served["connection"]
    for kind in ("status 429", "status 500", "timeout", "unreadable"):
        assert troubles[kind] == server.served[kind], kind
    found = records(tmp_path / "out")
    assert [record["id"] for record in found] == [f"d{n}#{k}" for n in range(18) for k in (0, 1)]
    for record in found:
        text = make_text(int(record["id"][1:].split("#")[0]), 15)
        spans = record["spans"]
        assert [span["source"][0] for span in spans[1:]] == [
            span["source"][1] for span in spans[:-1]
        ]
        assert (spans[0]["source"][0], spans[-1]["source"][1]) == (0, len(text))
        for span in spans:
            start, end = span["source"]
            assert record["text"][slice(*span["text"])] == rewrite(text[start:end])
    assert report["requests"] == server.served["answered"] + sum(
        server.served[k] for k in TRANSPORT
    )
    assert report["chunks_dropped"] == 0


def test_provenance_says_where_each_span_comes_from(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 1, 10)
    with serving(Plan()) as server:
        rephrase(*flags(server, corpus, tmp_path / "out", "--chunk-tokens", "64"))
    (record,) = records(tmp_path / "out")
    assert record["source"]["file"] == "in.jsonl" and record["source"]["line"] == 1
    assert record["prompt"]["id"].startswith("rewrite/encyclopaedia/")
    assert len(record["prompt"]["hash"]) == 16
    assert record["model"] == "rule"
    assert record["sampler"] == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 256}
    for span, body in zip(record["spans"], server.bodies, strict=True):
        assert span["seed"] == body["seed"]
        assert span["tokens"] == [100, 50]
        assert {v["check"] for v in span["verdicts"]} >= {"numbers", "names", "similarity"}
        assert all(v["passed"] for v in span["verdicts"])


def test_each_chunk_sees_its_excerpt_and_what_was_rewritten_before(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 1, 20)
    with serving(Plan()) as server:
        rephrase(*flags(server, corpus, tmp_path / "out", "--chunk-tokens", "64"))
    text = make_text(0, 20)
    (record,) = records(tmp_path / "out")
    users = [body["messages"][-1]["content"] for body in server.bodies]
    assert len(users) == len(record["spans"]) > 3
    assert all(text in user for user in users)
    assert "<rewritten>" not in users[0]
    for user, span in zip(users[1:], record["spans"][1:], strict=True):
        done = user.split("<rewritten>\n", 1)[1].split("\n</rewritten>", 1)[0]
        assert done == record["text"][: span["text"][0]].rstrip()
        # The excerpt and the start of what is done stand alike in all requests: a cached prefix.
        assert user.startswith(users[1].split("</rewritten>", 1)[0].rstrip())


def test_a_chunk_that_always_fails_is_dropped_kept_or_takes_its_document(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 2, 10)
    shown: dict[str, list[dict[str, Any]]] = {}
    for policy in ("drop", "source", "drop-document"):
        output = tmp_path / policy
        # Half of all seeds fail: with one attempt some chunks do, others not.
        with serving(Plan((), ("numbers",), percent_each=50)) as server:
            rephrase(
                *flags(server, corpus, output, "--chunk-tokens", "32"),
                *("--attempts", "1", "--on-failure", policy),
            )
        shown[policy] = records(output)
    kinds = {
        policy: [s["kind"] for r in found for s in r["spans"]] for policy, found in shown.items()
    }
    assert "dropped" in kinds["drop"] and "rewritten" in kinds["drop"]
    assert [kind.replace("dropped", "source") for kind in kinds["drop"]] == kinds["source"]
    for record in shown["drop"]:
        for span in record["spans"]:
            assert (span["text"][0] == span["text"][1]) == (span["kind"] == "dropped")
            assert ("rejected" in span) == (span["kind"] == "dropped")
    for record in shown["source"]:
        text = make_text(int(record["id"][1]), 10)
        for span in record["spans"]:
            if span["kind"] == "source":
                assert record["text"][slice(*span["text"])] == text[slice(*span["source"])].strip()
    assert len(shown["drop-document"]) < 2


def test_budgets_are_never_exceeded_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 12, 10)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    with serving(Plan()) as server:
        rephrase(*flags(server, corpus, whole, "--chunk-tokens", "64"))
        needed = server.served["answered"]
        failed = rephrase(
            *flags(server, corpus, parted, "--chunk-tokens", "64", "--max-requests", "10")
        )
        assert server.served["answered"] == needed + 10
        assert "--max-requests 10 are spent" in failed[0]
        failed = rephrase(
            *flags(server, corpus, parted, "--chunk-tokens", "64", "--max-tokens", "4500")
        )
        spent = (server.served["answered"] - needed) * 150
        assert spent <= 4500 and "--max-tokens 4500" in failed[0]
        assert rephrase(*flags(server, corpus, parted, "--chunk-tokens", "64")) == []
        assert server.served["answered"] == 2 * needed  # nothing was asked twice
    assert published(whole) == published(parted)


def test_a_run_of_other_flags_or_input_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 2, 5)
    with serving(Plan()) as server:
        rephrase(*flags(server, corpus, tmp_path / "out"))
        with pytest.raises(ValueError, match="other --seed"):
            rephrase(*flags(server, corpus, tmp_path / "out", "--seed", "2"))
        write_corpus(corpus, 3, 5)
        with pytest.raises(ValueError, match="other --input"):
            rephrase(*flags(server, corpus, tmp_path / "out"))


def test_the_journal_alone_gives_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 6, 10)
    with serving(Plan((), ANSWERS)) as server:
        rephrase(*flags(server, corpus, tmp_path / "out", "--attempts", "6"))
        asked, first = server.served["answered"], published(tmp_path / "out")
        for path in (tmp_path / "out" / "parts").iterdir():
            path.unlink()
        rephrase(*flags(server, corpus, tmp_path / "out", "--attempts", "6"))
        assert server.served["answered"] == asked
    assert published(tmp_path / "out") == first


def test_a_server_that_is_gone_stops_the_run_and_drops_nothing(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 3, 5)
    with serving(Plan()) as server:
        pass  # nobody listens any more
    failed = rephrase(*flags(server, corpus, tmp_path / "out", "--max-tries", "2"))
    assert "gave no answer in 2 tries" in failed[0]
    assert records(tmp_path / "out") == []


def killed_run(arguments: list[str], journal: Path, after_lines: int) -> bool:
    """Start the tool and kill it once so many attempts are recorded; return whether it was."""
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        lines = sum(path.read_bytes().count(b"\n") for path in journal.glob("*.jsonl"))
        if lines >= after_lines:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    return False


def check_kills(tmp_path: Path, num_documents: int, kills: list[int]) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", num_documents, 12)
    plan = Plan(("status 500",), ANSWERS, percent_each=6, latency_s=0.02)
    extra = ("--chunk-tokens", "64", "--attempts", "6", "--concurrency", "4")
    with serving(plan) as server:
        rephrase(*flags(server, corpus, tmp_path / "whole", *extra))
        arguments = flags(server, corpus, tmp_path / "killed", *extra)
        journal = tmp_path / "killed" / "journal"
        killed = [killed_run(arguments, journal, after) for after in kills]
        assert all(killed)
        torn = max(journal.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with torn.open("ab") as file:
            file.write(b'0badc0de {"key": "cut by a ki')
        assert rephrase(*arguments) == []
    assert published(tmp_path / "killed") == published(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    again = json.loads((tmp_path / "killed" / "report.json").read_text())
    whole.pop("failed_requests"), again.pop("failed_requests")  # a killed run may meet a 500 alone
    # Requests that a kill cut off count, and at the most that they can cost.
    assert again.pop("requests") >= server.served.total() - sum(
        server.served[kind] for kind in ANSWERS
    ) - whole.pop("requests")
    assert again.pop("tokens") >= whole.pop("tokens")
    assert whole == again


def test_kill_minus_nine_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, 12, [24])


@pytest.mark.evidence
def test_twelve_kills_give_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, 30, list(range(6, 102, 8)))


@pytest.mark.evidence  # half a minute of starting Ray
def test_ray_gives_the_same_records_as_local_mode(tmp_path: Path) -> None:
    from megatron_k2.compat import optional

    if not optional("ray").usable:
        pytest.skip(f"Ray is not usable: {optional('ray').cause}")
    corpus = write_corpus(tmp_path / "in.jsonl", 23, 15)
    extra = ("--chunk-tokens", "64", "--attempts", "6", "--rephrasings", "2")
    with serving(Plan(("status 500",), ANSWERS)) as server:
        assert rephrase(*flags(server, corpus, tmp_path / "local", *extra)) == []
        try:
            assert rephrase(*flags(server, corpus, tmp_path / "ray", *extra, "--ray")) == []
        finally:
            importlib.import_module("ray").shutdown()  # its daemons would outlive this test
    assert published(tmp_path / "ray") == published(tmp_path / "local")
    assert len(records(tmp_path / "ray")) == 46


def test_a_429_halves_what_is_under_way_and_holds_all_back(tmp_path: Path) -> None:
    from megatron_k2.data.rephrase.gate import Gate

    async def check() -> None:
        gate = Gate(8)
        async with gate.passing() as first, gate.passing() as second:
            gate.refused(first, 0.2)
            gate.refused(second, 0.2)  # of the same moment: halved once
            assert int(gate.limit) == 4
        began = time.monotonic()
        async with gate.passing():
            assert time.monotonic() - began >= 0.19
        for _ in range(40):
            gate.answered()
        assert gate.limit == 8

    asyncio.run(check())
