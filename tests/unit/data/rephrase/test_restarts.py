"""What was answered is never asked again, and budgets count every request, over all starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.data.rephrase import client as client_module
from megatron_k2.data.rephrase import rewriter as rewriter_module
from megatron_k2.data.rephrase.ray_mode import shares, start_ray
from megatron_k2.data.rephrase.report import Progress
from megatron_k2.data.rephrase.sources import Part
from tests.unit.data.rephrase.scripted_server import Plan, ScriptedServer, serving
from tests.unit.data.rephrase.test_pipeline import flags, published, rephrase, write_corpus

JUDGE = ("--checks", "numbers", "judge", "--judge-model", "judge")
GOOD = '{"faithful": true, "score": 9, "problems": []}'


class Judged(ScriptedServer):
    """A server with an embedder, and a judge that first answers something that is no judgement."""

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        if "input" in body:
            rows = [{"index": n, "embedding": [1.0, 0.0]} for n in range(len(body["input"]))]
            return {"data": rows, "usage": {"prompt_tokens": 5, "total_tokens": 5}}
        if body["model"] != "judge":
            return super()._completion(body)
        asked = body["messages"][-1]["content"]
        seen = sum(other["messages"][-1]["content"] == asked for other in self.bodies)
        message = {"content": GOOD if seen > 1 else "no idea"}
        choice = {"message": message, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"total_tokens": 7}}


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def test_answers_without_verdicts_are_judged_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 4, 5)

    def no_checks(*_: Any) -> None:
        raise RuntimeError("the process ends here")

    with serving(Plan()) as server:
        arguments = flags(server, corpus, tmp_path / "out")
        with monkeypatch.context() as broken:
            broken.setattr(rewriter_module, "check_faults", no_checks)
            assert "the process ends here" in rephrase(*arguments)[0]
        asked = server.served["answered"]
        assert asked == 4
        assert rephrase(*arguments, "--max-requests", "4") == []
        assert server.served["answered"] == asked
    assert (report(tmp_path / "out")["requests"], report(tmp_path / "out")["chunks"]) == (4, 4)


def test_a_judges_second_tries_are_counted_recorded_and_within_the_budget(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 6, 5)
    with serving(Plan(), Judged) as server:
        arguments = flags(server, corpus, tmp_path / "out", *JUDGE, "--concurrency", "1")
        for most in (4, 7, 8, 11, 14):  # most of them end between an answer and its judgement
            failed = rephrase(*arguments, "--max-requests", str(most))
            assert f"--max-requests {most} are spent" in failed[0]
            assert server.served["answered"] == most
        assert rephrase(*arguments) == []
        assert server.served["answered"] == 6 * 3  # an answer and two judgements each
    found = report(tmp_path / "out")
    assert (found["requests"], found["tokens"]) == (18, 6 * (150 + 2 * 7))


def test_an_embedders_requests_are_counted_and_within_the_budget(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 3, 5)
    with serving(Plan(), Judged) as server:
        arguments = flags(server, corpus, tmp_path / "out", "--checks", "similarity")
        arguments += ["--embedder", "endpoint", "--embedding-model", "e", "--concurrency", "1"]
        assert "--max-requests 4 are spent" in rephrase(*arguments, "--max-requests", "4")[0]
        assert server.served["answered"] == 4
        assert rephrase(*arguments) == []
        asked = server.served["answered"]
    found = report(tmp_path / "out")
    embedded = asked - 3
    assert embedded >= 3 and found["requests"] == asked
    assert found["tokens"] == 3 * 150 + embedded * 5


def test_failed_tries_count_over_restarts_and_time_outs_cost_the_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.0)
    corpus = write_corpus(tmp_path / "in.jsonl", 1, 5)
    plan = Plan(("timeout",), percent_each=100)
    with serving(plan) as server:
        arguments = flags(server, corpus, tmp_path / "out", "--timeout-s", "0.2")
        failed = rephrase(*arguments, "--max-tries", "1")
        assert "gave no answer in 1 tries (1 x timeout)" in failed[0]
        assert "--max-requests 1 are spent" in rephrase(*arguments, "--max-requests", "1")[0]
        assert server.served.total() == 1
        assert rephrase(*arguments, "--timeout-s", "60") == []
    found = report(tmp_path / "out")
    assert (found["requests"], found["failed_requests"]) == (2, {"timeout": 1})
    assert found["tokens"] > 150 + 1024  # --max-new-tokens and the prompt are what it can cost


def test_journals_of_all_parts_count_before_the_first_request(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 10, 5)  # two parts
    with serving(Plan()) as server:
        arguments = flags(server, corpus, tmp_path / "out", "--concurrency", "16")
        assert rephrase(*arguments, "--max-requests", "9") != []
        shutil.rmtree(tmp_path / "out" / "parts", ignore_errors=True)
        (tmp_path / "out" / "journal" / "part-00000.jsonl").unlink()
        there = 4  # of the second part
        failed = rephrase(*arguments, "--max-requests", "6")
        assert "--max-requests 6 are spent" in failed[0]
        assert server.served["answered"] == 9 + 6 - there


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 2, 5)
    with serving(Plan()) as server:
        arguments = flags(server, corpus, tmp_path / "out")
        assert rephrase(*arguments) == []
        before = published(tmp_path / "out")
        part = tmp_path / "out" / "parts" / "part-00000.jsonl"
        part.write_bytes(before[:-9] + b"\n")
        with pytest.raises(ValueError, match=r"part-00000\.jsonl was changed after it"):
            rephrase(*arguments)
        part.unlink()
        assert rephrase(*arguments) == [] and published(tmp_path / "out") == before
        shutil.rmtree(tmp_path / "out" / "journal")
        with pytest.raises(ValueError, match="holds a run with other --seed"):
            rephrase(*arguments, "--seed", "2")


def test_shares_of_a_budget_add_up_over_restarts() -> None:
    parts = [Part(n, "x", "x", 1, documents, "text") for n, documents in enumerate((5, 5, 2))]
    first = shares("--max-requests", 7, {}, parts)
    assert first == {0: 2, 1: 3, 2: 2} and sum(filter(None, first.values())) == 7
    # The first is published, having spent 1; the second spent 3.
    again = shares("--max-requests", 9, {0: 1, 1: 3}, parts[1:])
    assert 1 + sum(filter(None, again.values())) == 9 and again[1] > 3  # type: ignore[operator]
    assert shares("--max-requests", None, {}, parts[:1]) == {0: None}
    with pytest.raises(ValueError, match=r"--max-requests 2: .* each of 3 unfinished parts"):
        shares("--max-requests", 2, {}, parts)


def test_ray_that_does_not_start_is_one_line_and_its_chunks_are_counted() -> None:
    class Broken:
        @staticmethod
        def init(**_: Any) -> None:
            raise ConnectionError("no cluster at x:1\nand many lines more")

    with pytest.raises(ValueError, match=r"\A--ray: Ray did not start \(no cluster at x:1\); see"):
        start_ray(Broken, "x:1")
    progress = Progress(9, 0, quiet=True)
    progress.done(4, 11)
    progress.close()
    assert progress.chunks == 11
