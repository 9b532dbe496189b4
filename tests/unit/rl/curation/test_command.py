"""tools/curate_tasks.py: what it writes, refuses, and does after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.gym.registry import environment
from megatron_k2.rl.curation.command import curate
from megatron_k2.rl.curation.difficulty import MEASURED
from megatron_k2.rl.curation.sampler import TaskSampler, TaskSource
from megatron_k2.rl.curation.task_file import read_tasks, write_tasks
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine
from tests.unit.rl.curation.killed_curation import answers

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = Path(__file__).with_name("killed_curation.py")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Flags: 12 tasks of critic_pairs and a folder that looks like Megatron's checkpoints."""
    tasks = environment("critic_pairs").load("train", 12, prompt="compact", pairs=2)
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    return ["--tasks", str(tmp_path / "tasks.jsonl"), "--model", str(tmp_path)]


def run(flags: list[str], engine: ScriptedEngine | None = None) -> None:
    made = engine or ScriptedEngine(answers)
    curate([*flags, "--quiet"], lambda folder, args: (made, ByteFormat()))


def test_kept_tasks_go_into_a_sampler(given: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    run([*given, "--output", str(out), "--guesses", "0", "--samples", "3", "--high", "1"])
    tasks = read_tasks(tmp_path / "tasks.jsonl")
    right = [one.id for one in tasks if one.metadata["expected"] == ["A", "A", "B", "B"]]
    kept = read_tasks(out / "kept.jsonl")
    assert [one.id for one in kept] == right != []
    assert kept[0].metadata[MEASURED]["right"] == 3 and kept[0].metadata[MEASURED]["weight"] == 1.0
    rows = [json.loads(line) for line in (out / "measured.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["reason"] for row in rows} == {None, "too hard"}
    said = capsys.readouterr().out
    assert f"{len(right)} of 12 tasks kept" in said and (out / "report.txt").read_text() in said
    assert (out / "report.png").stat().st_size > 5_000
    one, at = TaskSampler([TaskSource("critic_pairs", kept)], 1).draw(1, 0)[0]
    assert one.id in right and at == 0


def test_guessed_tasks_and_forms_are_left_out(given: list[str], tmp_path: Path, capsys) -> None:
    few = ["--samples", "2", "--guesses", "1"]
    run([*given, *few, "--output", str(tmp_path / "a"), "--high", "1"])
    assert "guessed" in capsys.readouterr().out  # a script that reads no question guesses
    engine = ScriptedEngine(answers)
    run([*given, "--output", str(tmp_path / "b"), "--drop", "critic"], engine)
    assert "12 tag domain:critic" in capsys.readouterr().out and engine.requests == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ([], "--environments"), (["--tasks", "none.jsonl"], "--tasks"),
        (["--environments", "critic_pairs", "--low", "2"], "--low"),
        (["--environments", "critic_pairs", "--k", "20"], "--samples"),
        (["--environments", "critic_pairs", "--server", "http://x"], "one of the two"),
        (["--environments", "critic_pairs", "--thin-power", "3"], "--thin-power"),
        (["--environments", "no_such"], "no_such"),
    ],
)  # fmt: skip
def test_wrong_flags_are_named(given: list[str], tmp_path: Path, flags, why) -> None:
    with pytest.raises(ValueError, match=why):
        run([*given[2:], "--output", str(tmp_path / "out"), *flags])


@pytest.mark.evidence  # a process of its own; test_measuring has the same without one
def test_a_killed_curation_goes_on_to_the_same_bytes(given: list[str], tmp_path: Path) -> None:
    flags = [*given, "--quiet", "--samples", "4", "--guesses", "1", "--concurrency", "2"]

    def started(step_s: str, out: str) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), step_s, *flags, "--output", str(tmp_path / out)]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)

    journal = tmp_path / "killed" / "journal.jsonl"
    victim = started("0.005", "killed")
    while victim.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 9):
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = journal.read_bytes().count(b"\n")
    assert 9 <= before < 61 and not (tmp_path / "killed" / "kept.jsonl").exists()
    engine = ScriptedEngine(answers)
    run([*flags, "--output", str(tmp_path / "killed")], engine)
    assert len(engine.requests) <= 61 - before + 1
    run([*flags, "--output", str(tmp_path / "whole")])
    for name in ("kept.jsonl", "measured.jsonl", "report.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
