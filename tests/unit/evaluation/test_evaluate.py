"""Evaluation against a server: scores, intervals, faults, resumption, tool calls."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_k2.evaluation.asking import Said
from megatron_k2.evaluation.command import evaluate
from megatron_k2.evaluation.harness import with_intervals
from megatron_k2.evaluation.intervals import bootstrap_mean, wilson
from megatron_k2.evaluation.scores import exact_score
from megatron_k2.evaluation.tasks import RULES, read_tasks

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
        },
    },
}


class Oracle(ThreadingHTTPServer):
    """Says what a function says to the last message; counts who asked what."""

    daemon_threads = True

    def __init__(self, say: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.asked, self.lock = say, Counter[str](), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Oracle

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked[asked] += 1
            times = self.server.asked[asked]
        said = self.server.say(asked, times, body)
        status, message = said if isinstance(said, tuple) else (200, said)
        if isinstance(message, str):
            message = {"role": "assistant", "content": message}
        calls = "tool_calls" in message
        answer: dict[str, Any] = {"error": {"message": "no"}}
        if status == 200:
            answer = {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "message": message,
                        "finish_reason": "tool_calls" if calls else "stop",
                    }
                ],
                "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
            }
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        if status == 429:
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Be quiet."""


@contextmanager
def oracle(say: Any) -> Iterator[Oracle]:
    server = Oracle(say)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(command: str, server: Oracle, output: Path, *more: str) -> dict[str, Any]:
    arguments = ["--server", server.url, "--model", "m", "--output", str(output), "--quiet"]
    assert evaluate([command, *arguments, *more]) is None
    found: dict[str, Any] = json.loads((output / "results.json").read_text())["results"]
    return found


@pytest.mark.parametrize(
    ("rule", "text", "answer", "right"),
    [
        ("exact", " The  answer. ", "the answer", True),
        ("exact", "the answer is", "the answer", False),
        ("contains", "It is Rome, I think", "rome", True),
        ("contains", "It is Romeo", "rome", False),
        ("number", "6 x 7 = 42.", "42", True),
        ("number", "so 1,042.50 in all", "1042.5", True),
        ("number", r"either 7 or \boxed{8} of 9", "8", True),
        ("number", "no number", "0", False),
        ("number", "41", "42", False),
        ("regex", "abc123", r"c\d+$", True),
    ],
)
def test_rules(rule: str, text: str, answer: str, right: bool) -> None:
    assert RULES[rule](text, answer) is right


def test_wilson_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        found = [wilson(hits, 60) for hits in draw.binomial(60, share, size=2000)]
        held = np.mean([low <= share <= high for low, high in found])
        assert 0.92 < held < 0.99, (share, held)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(5, 5)[1] == 1.0
    low, high = bootstrap_mean([0.0, 1.0] * 50)
    assert low < 0.42 < 0.58 < high and bootstrap_mean([1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_scores_by_group_and_errors_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{n}", "answer": n, "match": "number", "group": "ab"[n % 2]} for n in range(8)
    ]
    tasks = write(tmp_path / "t.jsonl", [*rows, {"prompt": "refused", "answer": "x", "group": "a"}])

    def say(asked: str, times: int, body: dict[str, Any]) -> Any:
        if asked == "refused":
            return 400, ""
        if times == 1 and asked == "q3":
            return 429, ""
        return f"it is {asked[1:]}" if asked != "q5" else "it is 0"

    with oracle(say) as server:
        found = run("exact", server, tmp_path / "out", "--tasks", str(tasks))
        assert server.asked["q3"] == 2  # the client tried again
    assert found["all"]["accuracy"] == 7 / 8 and found["all"]["errors"] == 1
    assert found["a"]["accuracy"] == 1.0 and found["b"]["accuracy"] == 3 / 4
    assert found["all"]["interval"] == list(wilson(7, 8))
    assert found["all"]["finish_reasons"] == {"error": 1, "stop": 8}
    answers = [json.loads(x) for x in (tmp_path / "out" / "answers.jsonl").open()]
    assert [one["right"] for one in answers] == [True] * 5 + [False, True, True, None]


def test_a_run_goes_on_where_the_server_went_away_and_asks_nothing_twice(tmp_path: Path) -> None:
    tasks = write(tmp_path / "t.jsonl", [{"prompt": f"q{n}", "answer": "yes"} for n in range(6)])
    down = True

    def say(asked: str, times: int, body: dict[str, Any]) -> Any:
        return (404, "") if down and asked == "q4" else "yes"

    with oracle(say) as server:
        flags = ("--tasks", str(tasks), "--concurrency", "1")
        with pytest.raises(ValueError, match=r"--server .*--model m"):
            run("exact", server, tmp_path / "out", *flags)
        down = False
        assert run("exact", server, tmp_path / "out", *flags)["all"]["accuracy"] == 1.0
        assert server.asked == Counter(q0=1, q1=1, q2=1, q3=1, q4=2, q5=1)
        with pytest.raises(ValueError, match="asked in another way"):
            run("exact", server, tmp_path / "out", *flags, "--max-tokens", "7")


def test_tasks_without_a_group_do_not_take_the_place_of_all(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"p{n}\u2028", "answer": "a", "group": "g"} for n in range(3)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:3]))
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "alone", "answer": "a"}) + "\n")
    tasks = read_tasks(path)
    said = [[Said({"content": "a"}, "stop", 1)]] * 3 + [[Said({"content": "b"}, "stop", 1)]]
    report = exact_score(tasks, said)
    assert report["all"]["tasks"] == 4 and report["all"]["accuracy"] == 0.75
    assert report["ungrouped"]["accuracy"] == 0.0 and report["g"]["tasks"] == 3
    path.write_text('{"prompt": "p", "answer": "a", "group": "all"}\n')
    with pytest.raises(ValueError, match="group 'all'"):
        read_tasks(path)


def test_samples_have_seeds_of_their_own_and_an_interval_over_tasks(tmp_path: Path) -> None:
    tasks = write(tmp_path / "t.jsonl", [{"prompt": f"q{n}", "answer": "yes"} for n in range(10)])

    def say(asked: str, times: int, body: dict[str, Any]) -> Any:
        return "yes" if body["seed"] % 2 == 0 else "no"

    with oracle(say) as server:
        found = run("exact", server, tmp_path / "out", "--tasks", str(tasks), "--samples", "4")
    assert found["all"]["accuracy"] == 0.5 and found["all"]["any_right"] == 1.0
    assert found["all"]["interval"] == [0.5, 0.5]


def test_tool_calls_are_checked_by_name_schema_and_count(tmp_path: Path) -> None:
    def call(id: str, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": id, "type": "function", "function": function}],
        }

    says = {
        "good": call("functions.add:0", "add", '{"a": 1}'),
        "schema": call("functions.add:0", "add", '{"a": "1"}'),
        "name": call("functions.sub:0", "sub", '{"a": 1}'),
        "json": call("functions.add:0", "add", '{"a": '),
        "silent": {"role": "assistant", "content": "no"},
    }
    reference = call("functions.add:0", "add", '{"a": 1}')
    rows = [
        {"messages": [{"role": "user", "content": name}, reference], "tools": [TOOL]}
        for name in says
    ]
    with oracle(lambda asked, times, body: says[asked] if body["tools"] else "") as server:
        dialogues = write(tmp_path / "d.jsonl", rows)
        found = run("tools", server, tmp_path / "out", "--dialogues", str(dialogues))
    assert found["answers"] == 5 and found["calling"] == 4 and found["calls"] == 4
    assert found["schema_accuracy"] == 1 / 4 and found["valid_calls"] == 1 / 4
    assert found["problems"] == {"json": 1, "name": 1, "schema": 1}
    assert found["trigger_f1"] == 2 * 4 / (4 + 5)
    assert found["finish_reasons"] == {"stop": 1, "tool_calls": 4}


def test_the_harness_scores_get_intervals_from_their_standard_errors() -> None:
    scores = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "n,none": 3, "sample_len": 9}
    found = with_intervals(scores)
    assert found["acc_interval,none"] == pytest.approx([0.5 - 0.196, 0.5 + 0.196], abs=1e-4)
    assert "n_interval,none" not in found and found["sample_len"] == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ('{"prompt": "a"}', "answer, or answers, is needed"),
        ('{"prompt": "a", "answer": "x", "match": "guess"}', "'guess' is none of"),
        ('{"prompt": "a", "answer": "x", "match": "number"}', "has no number in it"),
        ('{"prompt": "a", "answer": "(", "match": "regex"}', "no regular expression"),
        ("", "no task in it"),
    ],
)
def test_a_malformed_task_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_tasks(path)
