"""Killed at any moment and started again, the tool writes the same bytes; so does any worker."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.data.preprocess import publish, run
from megatron_k2.data.preprocess.parts import Unit
from megatron_k2.data.preprocess.unit_queue import UnitQueue
from tests.unit.data.preprocess.inputs import contents, jsonl, kimi_flags, texts, tokenise

ROOT = Path(__file__).resolve().parents[4]
DOCUMENTS = texts(250) + texts(50)  # the last are copies
DOCUMENTS += [f"{text} and a word more" for text in DOCUMENTS[10:40]]
FLAGS = ["--append-eod", "--dedup", "minhash", "--block-bytes", "4000", "--commit-s", "0"]
AT_THE_END = ["--commit-s", "60"]


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return kimi_flags(tmp_path_factory.mktemp("kimi"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    thirds = (DOCUMENTS[:120], DOCUMENTS[120:200], DOCUMENTS[200:])
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl")
    return [jsonl(folder / name, third) for name, third in zip(names, thirds, strict=True)]


@pytest.fixture(scope="module")
def whole(kimi, inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(tokenise(tmp_path_factory.mktemp("whole") / "out", inputs, *kimi, *FLAGS))


def kill_at_random(command: list[str], folder: Path, times: int, seed: int) -> int:
    """Start and kill, at most so many times, until a start is done first; return the kills.

    The clock runs from the moment that the run takes its folder: before, there is nothing to lose.
    """
    generator = random.Random(seed)
    for kills in range(times):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not _has_journal_of(process.pid, folder):
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 0.3))
        if process.poll() is not None:
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return times


def _has_journal_of(pid: int, folder: Path) -> bool:
    """Return whether a process has the folder's journal open."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if link.readlink() == folder / "journal.jsonl":
                    return True
    return False


def test_five_random_kills_leave_no_trace(kimi, inputs, whole, tmp_path) -> None:
    """Of forked processes, which spare the start; `make evidence` kills the command itself."""
    generator, prefix = random.Random(7), tmp_path / "out"
    journal = tmp_path / "out.partial" / "journal.jsonl"
    kills_at_work = size = 0
    for _ in range(5):
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                tokenise(prefix, inputs, *kimi, *FLAGS)
            os._exit(0)
        deadline = time.monotonic() + 20
        while (grown := _size(journal) - size) <= 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills_at_work += grown > 0 and journal.exists()
        size = _size(journal)
    assert kills_at_work >= 3, "the run was done too soon"
    if not list(tmp_path.glob("*.idx")):
        tokenise(prefix, inputs, *kimi, *FLAGS)
    assert contents(prefix) == whole
    assert b'"num_near_duplicates": 0' not in whole[".json"]


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


@pytest.mark.evidence
def test_fifty_random_kills_of_the_command_leave_no_trace(kimi, inputs, whole, tmp_path) -> None:
    kills, attempt = 0, 0
    while kills < 50:
        prefix = tmp_path / str(attempt) / "out"
        command = [sys.executable, "tools/preprocess_data.py", "--input", *map(str, inputs)]
        command += ["--output-prefix", str(prefix), *kimi, *FLAGS]
        command += ["--workers", str(1 + attempt % 2)]
        folder = prefix.with_name("out.partial")
        kills += kill_at_random(command, folder, 50 - kills, seed=attempt)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
        assert contents(prefix) == whole
        attempt += 1


def test_it_goes_on_from_the_last_commit(kimi, inputs, whole, tmp_path, monkeypatch) -> None:
    prefix, made = tmp_path / "out", []
    make, commit = run.worker.PartMaker.make, run.Merger.commit

    def stop_after_20(self, unit):
        made.append(unit)
        if len(made) == 20:
            raise KeyboardInterrupt
        return make(self, unit)

    monkeypatch.setattr(run.worker.PartMaker, "make", stop_after_20)
    with pytest.raises(KeyboardInterrupt):
        tokenise(prefix, inputs, *kimi, *FLAGS)
    first = made.copy()
    # Bytes after the last commit, as a kill leaves them; and a part that a power cut tore.
    with open(prefix.with_name("out.partial") / "0.bin", "ab") as file:
        file.write(b"garbage")
    monkeypatch.setattr(run.Merger, "commit", lambda self: commit(self))
    tokenise(prefix, inputs, *kimi, *FLAGS)
    assert not set(first[:-1]) & set(made[20:])
    assert contents(prefix) == whole


def test_parts_of_a_killed_run_are_used_or_made_anew_if_torn(
    kimi, inputs, whole, tmp_path, monkeypatch
) -> None:
    """Parts wait for the first: nothing is merged, then one of them is damaged."""
    prefix, made = tmp_path / "out", []
    make, advance = run.worker.PartMaker.make, run._Run._advance

    def counted(self, unit):
        made.append(unit)
        if len(made) == 10:
            raise KeyboardInterrupt
        return make(self, unit)

    monkeypatch.setattr(run.worker.PartMaker, "make", counted)
    monkeypatch.setattr(run._Run, "_advance", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        tokenise(prefix, inputs, *kimi, *FLAGS)
    monkeypatch.setattr(run._Run, "_advance", advance)
    torn = next((prefix.with_name("out.partial") / "parts").glob("000000-000003.0.tokens"))
    data = bytearray(torn.read_bytes())
    data[10] ^= 1
    torn.write_bytes(data)
    tokenise(prefix, inputs, *kimi, *FLAGS)
    assert set(made[:9]) & set(made[10:]) == {Unit(0, 3)}
    assert contents(prefix) == whole


@pytest.mark.parametrize("renames", [1, 3])
def test_a_kill_while_files_get_their_names(
    kimi, inputs, whole, tmp_path, monkeypatch, renames: int
) -> None:
    prefix, done, replace = tmp_path / "out", [], os.replace

    def some(source, target):
        if Path(target).parent == tmp_path:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    monkeypatch.setattr(publish.os, "replace", some)
    with pytest.raises(KeyboardInterrupt):
        tokenise(prefix, inputs, *kimi, *FLAGS, *AT_THE_END)
    assert not list(tmp_path.glob("*.idx"))
    monkeypatch.undo()
    tokenise(prefix, inputs, *kimi, *FLAGS, *AT_THE_END)
    assert contents(prefix) == whole


@pytest.mark.parametrize("left", [0, 4])
def test_a_kill_while_the_rest_is_removed(
    kimi, inputs, whole, tmp_path, monkeypatch, left: int
) -> None:
    prefix, done, unlink = tmp_path / "out", [], Path.unlink

    def some(path, missing_ok=False):
        if path.parent.name == "out.partial" and "partial" not in path.name:
            if len(done) == left:
                raise KeyboardInterrupt
            done.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", some)
        with pytest.raises(KeyboardInterrupt):
            tokenise(prefix, inputs, *kimi, *FLAGS, *AT_THE_END)
    with pytest.raises(ValueError, match="other input or other flags"):
        tokenise(prefix, inputs[:2], *kimi, *FLAGS)
    tokenise(prefix, inputs, *kimi, *FLAGS, *AT_THE_END)
    assert contents(prefix) == whole


def test_other_flags_other_input_and_a_finished_output_are_refused(
    kimi, inputs, tmp_path, monkeypatch
) -> None:
    prefix, made, make = tmp_path / "out", [], run.worker.PartMaker.make

    def stop_at_third(self, unit):
        made.append(unit)
        if len(made) == 3:
            raise MemoryError
        return make(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(run.worker.PartMaker, "make", stop_at_third)
        with pytest.raises(MemoryError):
            tokenise(prefix, inputs, *kimi, *FLAGS)
    with pytest.raises(ValueError, match="other input or other flags"):
        tokenise(prefix, inputs, *kimi)
    with pytest.raises(ValueError, match="other input or other flags"):
        tokenise(prefix, inputs[:2], *kimi, *FLAGS)
    tokenise(prefix, inputs, *kimi, *FLAGS, *AT_THE_END)
    with pytest.raises(ValueError, match="is there; remove it, or give another --output-prefix"):
        tokenise(prefix, inputs, *kimi)


def test_a_worker_that_dies_is_an_error_and_costs_nothing(kimi, inputs, whole, tmp_path) -> None:
    prefix = tmp_path / "out"
    command = [sys.executable, "tools/preprocess_data.py", "--input", *map(str, inputs)]
    command += ["--output-prefix", str(prefix), *kimi, *FLAGS, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split():
        time.sleep(0.002)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "a worker died" in errors
    tokenise(prefix, inputs, *kimi, *FLAGS)
    assert contents(prefix) == whole


def test_the_queue_hands_out_every_unit_once_and_shares_the_last_file() -> None:
    # Two packed files of 3 and 5 blocks, which only reading tells, and a plain one of 4.
    blocks = [3, 4, 5]
    queue = UnitQueue([None, 4, None], {Unit(1, 2), Unit(2, 0)}, Unit(0, 1))
    given: list[Unit] = []
    busy: dict[str, Unit] = {}
    for turn in range(40):
        worker = "abc"[turn % 3]
        if worker in busy:
            unit = busy.pop(worker)
            queue.finished(unit, unit.block >= blocks[unit.group] - 1)
        if (unit := queue.next_for(worker)) is not None:
            given.append(unit)
            busy[worker] = unit
    assert len(set(given)) == len(given)
    inside = {unit for unit in given if unit.block < blocks[unit.group]}
    everything = {Unit(s, b) for s, count in enumerate(blocks) for b in range(count)}
    assert inside == everything - {Unit(0, 0), Unit(1, 2), Unit(2, 0)}
    assert len(given) - len(inside) <= 4  # past an end that nobody knew
