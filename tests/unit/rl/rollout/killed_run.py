"""A small training run that can be killed at any write, and goes on from its last checkpoint.

The trainer is a hash: what it was given, in which order. Its checkpoint has the rollouts' state, as
a real one's. The weights' version is the step, and the engine's tokens depend on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_k2.journal import CheckedLines
from megatron_k2.rl.rollout.buffer import FileBuffer
from tests.unit.rl.rollout.scripted import SeededEngine, facts, rollouts_of, run, task_of

STEPS, GROUPS, SAVE_EVERY = 8, 3, 3
Checkpoint = dict[str, Any]


def train(folder: Path, mode: str) -> Checkpoint:
    """Run to the end, from the checkpoint if there is one; return the last state."""
    state: Checkpoint = {"step": 0, "rollouts": None, "trained": [], "groups": []}
    saved = folder / "checkpoint.json"
    if saved.exists():
        state = json.loads(saved.read_text())
    engine = SeededEngine(mean=12)
    rollouts = rollouts_of(
        engine, max_lag=0 if mode == "sync" else 2, group_size=2, max_restarts=1000
    )
    buffer = FileBuffer(folder / "buffer", rollouts.table._format, rollouts.settings)
    rollouts._buffer = rollouts.table._buffer = buffer
    if state["rollouts"] is not None:
        rollouts.load_state_dict(state["rollouts"])
    drawn = 0 if state["rollouts"] is None else state["rollouts"]["drawn"]

    def draw() -> Any:
        nonlocal drawn
        drawn += 1
        return task_of(drawn - 1, "talk" if drawn % 2 else "words")

    async def body() -> None:
        for step in range(state["step"], STEPS):
            engine.weight_version = step
            if mode == "sync":
                groups = await rollouts.collect([draw() for _ in range(GROUPS)], step, 1.0)
            else:
                groups = await rollouts.collect_partial(draw, GROUPS, step, 1.0, 6)
            what = hashlib.sha256(repr(facts(groups)).encode()).hexdigest()
            state["trained"].append(what)
            state["groups"].append([group.id for group in groups])
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
                state.update(step=step + 1, rollouts=rollouts.state_dict())
                temporary = folder / "checkpoint.new"
                temporary.write_text(json.dumps(state))
                os.replace(temporary, saved)
                rollouts.saved(state["rollouts"])
        await rollouts.close()

    run(body)
    return state


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; return the signal that ended it, 0 for none."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # the parent reports it
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def synced(folder: Path) -> dict[int, int]:
    """Return what the disk has of each file, in bytes by inode."""
    path = folder / "synced"
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(inode): int(size) for inode, size in (line.split() for line in lines)}


@contextlib.contextmanager
def dies_at(write: int, folder: Path) -> Iterator[None]:
    """Kill this process before the given write, rename or removal, counted from 0."""
    count = 0
    real = CheckedLines.append

    def append(self: CheckedLines, value: dict[str, Any], to_disk: bool) -> None:
        real(self, value, to_disk)
        if to_disk:
            there = os.fstat(self._stream.fileno())
            with open(folder / "synced", "a") as file:
                file.write(f"{there.st_ino} {there.st_size}\n")

    def deadly(function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count > write:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return call

    with (
        patch.object(CheckedLines, "append", deadly(append)),
        patch.object(os, "replace", deadly(os.replace)),
        patch.object(Path, "unlink", deadly(Path.unlink)),
    ):
        yield


def train_with_kills(folder: Path, mode: str, seed: int) -> tuple[Checkpoint, int]:
    """Kill the run again and again; return its last state and the number of kills."""
    source = random.Random(seed)
    folder.mkdir()
    kills = 0
    while True:
        at = source.randrange(1, 60)

        def work(at: int = at) -> None:
            with dies_at(at, folder):
                train(folder, mode)

        if not in_child(work):
            break
        kills += 1
        journal = folder / "buffer" / "open.jsonl"
        if source.random() < 0.5 and journal.exists():  # the power failed: the disk lacks the end
            size = journal.stat().st_size
            least = synced(folder).get(journal.stat().st_ino, size)
            os.truncate(journal, source.randint(min(least, size), size))
    return json.loads((folder / "checkpoint.json").read_text()), kills
