"""The durable buffer: what was played and not trained yet survives ``kill -9``.

``open.jsonl`` has the groups under way: a line when a group is opened, one for each episode that
is over, and at the end of each iteration a whole new file, with what was paused. A batch that is
delivered is a file of its own, and the rename that gives it its name is the moment of delivery: a
group is in one batch or open, never both, never neither. Batches stay until the trainer says that
its oldest checkpoint needs them no more; a trainer that goes back gets them again, in their order.
Lines carry checksums (``journal``). One process has a folder at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.journal import CheckedLines, JournalBusy
from megatron_k2.rl.episode import Group
from megatron_k2.rl.rollout.fresh import fresh_episode
from megatron_k2.rl.rollout.records import (
    OpenGroup,
    episode_line,
    fill_episode,
    group_line,
    task_from,
)
from megatron_k2.rl.rollout.settings import RolloutSettings

IDENTITY = ("seed", "group_size", "copy", "num_copies")
LAYOUT = 1  # raise with any change of the lines
OPEN, TEMPORARY = "open.jsonl", "new.jsonl"
TO_DISK_EVERY_S = 1.0  # what a power failure, no kill, takes of groups that are complete


@dataclass
class Batch:
    """Groups that were delivered together.

    Attributes:
        number: counts a run's batches.
        version: of the weights that it was for.
        drawn: groups that the run had drawn by then.
        groups: in the order of delivery.
    """

    number: int
    version: int
    drawn: int
    groups: list[Group]


class Buffer:
    """Where rollouts keep what is not trained yet. This one keeps nothing: for tests, evaluation,
    and workers whose driver keeps what they return."""

    def start(self, number: int) -> list[OpenGroup]:
        """Return the open groups; the next batch that is wanted is ``number``."""
        return []

    def recorded(self, number: int) -> Batch | None:
        """Return a batch that was delivered before."""
        return None

    def opened(self, group: OpenGroup) -> None:
        """Keep a new group."""

    def over(self, group: OpenGroup, index: int) -> None:
        """Keep an episode that is over, or begun anew."""

    def dropped(self, group: OpenGroup) -> None:
        """Forget a group."""

    def deliver(self, batch: Batch, numbers: Sequence[int], rest: Sequence[OpenGroup]) -> None:
        """Keep a batch, whose groups have these numbers, and the groups that are open after it."""

    def snapshot(self, groups: Sequence[OpenGroup]) -> None:
        """Keep the open groups as they are, in place of all that was kept of open groups."""

    def keep_from(self, number: int) -> None:
        """Forget the batches before ``number``: no checkpoint needs them any more."""

    def forget_from(self, number: int) -> None:
        """Forget the batches from ``number`` on, and all open groups."""

    def close(self) -> None:
        """Let another process have it."""


class FileBuffer(Buffer):
    """``Buffer`` in a folder.

    Args:
        folder: of this run, and of this engine where a run has several.
        format: of the episodes.
        settings: their seed, K and engine must be as they were.
        run: whatever else must be, such as a digest of the run file: a run whose training changed
            would otherwise be given what its old weights said.

    Raises:
        ValueError: another process has the folder, or it is of another run.
    """

    def __init__(
        self, folder: Path, format: KimiFormat, settings: RolloutSettings, run: str = ""
    ) -> None:
        self._folder, self._format = folder, format
        self._identity = {name: getattr(settings, name) for name in IDENTITY} | {"run": run}
        try:
            self._lines = CheckedLines(folder / OPEN)
        except JournalBusy as error:
            raise ValueError(f"another process plays rollouts into {folder}") from error
        try:
            (folder / TEMPORARY).unlink(missing_ok=True)
            self._next = self._check()
            self._open = self._read_open()
            if self._lines.before and self._lines.before[0]["next"] != self._next:
                # Killed behind a delivery: only the groups of the last batch may stand here too.
                self.snapshot(self._open)
        except BaseException:
            self._lines.close()
            raise
        self._lines.before.clear()
        self._on_disk_at = time.monotonic()

    def start(self, number: int) -> list[OpenGroup]:
        """Return the open groups.

        Raises:
            ValueError: batches from ``number`` on are missing.
        """
        there = set(self._batches())
        missing = [one for one in range(number, self._next) if one not in there]
        if missing or number > self._next:
            raise ValueError(
                f"{self._folder} has batches {sorted(there)} and comes to {self._next}; the "
                f"trainer's checkpoint goes on at {number}: take a checkpoint that fits, or "
                "start without what was played (forget_from)"
            )
        return self._open

    def recorded(self, number: int) -> Batch | None:
        """Return a batch that was delivered before.

        Raises:
            ValueError: its file is damaged.
        """
        path = self._path(number)
        if not path.exists():
            return None
        lines = CheckedLines(path)
        lines.close()
        header: dict[str, Any] = lines.before[0] if lines.before else {"lines": 1}
        if len(lines.before) != header["lines"]:
            raise ValueError(f"{path} is damaged behind its line {len(lines.before)}")
        groups = {group.id: group for group in self._groups(lines.before[1:])}
        found = [groups[name].closed() for name in header["groups"]]
        return Batch(number, header["version"], header["drawn"], found)

    def opened(self, group: OpenGroup) -> None:
        """Keep a new group."""
        self._lines.append(group_line(group), to_disk=False)

    def over(self, group: OpenGroup, index: int) -> None:
        """Keep an episode that is over, or begun anew."""
        due = group.is_complete and time.monotonic() - self._on_disk_at >= TO_DISK_EVERY_S
        self._lines.append(episode_line(group, index), to_disk=due)
        if due:
            self._on_disk_at = time.monotonic()

    def dropped(self, group: OpenGroup) -> None:
        """Forget a group."""
        self._lines.append({"kind": "dropped", "group": group.id}, to_disk=False)

    def deliver(self, batch: Batch, numbers: Sequence[int], rest: Sequence[OpenGroup]) -> None:
        """See ``Buffer``; ``batch`` is the next one."""
        assert batch.number == self._next
        groups = [
            OpenGroup(one.id, number, one.task, one.episodes)
            for number, one in zip(numbers, batch.groups, strict=True)
        ]
        header = {
            "kind": "batch",
            "version": batch.version,
            "drawn": batch.drawn,
            "groups": [one.id for one in groups],
            "lines": 1 + sum(1 + len(one.episodes) for one in groups),
        }
        # The batch says what was drawn: the disk must have the groups that stay open before it.
        self._lines.append({"kind": "delivers", "batch": batch.number}, to_disk=True)
        self._write([header, *_lines_of(groups)], self._path(batch.number)).close()
        self._next = batch.number + 1
        self.snapshot(rest)

    def snapshot(self, groups: Sequence[OpenGroup]) -> None:
        """Keep the open groups as they are, in place of all that was kept of open groups."""
        before = self._lines
        self._lines = self._write([self._header(), *_lines_of(groups)], self._folder / OPEN)
        before.close()

    def keep_from(self, number: int) -> None:
        """Forget the batches before ``number``: no checkpoint needs them any more."""
        for one in self._batches():
            if one < number:
                self._path(one).unlink()

    def forget_from(self, number: int) -> None:
        """Forget the batches from ``number`` on, and all open groups."""
        self._next, self._open = number, []
        for one in reversed(self._batches()):
            if one >= number:
                self._path(one).unlink()
        self.snapshot([])

    def close(self) -> None:
        """Let another process have it."""
        self._lines.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"batch-{number:08d}.jsonl"

    def _batches(self) -> list[int]:
        return sorted(int(path.stem.split("-")[1]) for path in self._folder.glob("batch-*.jsonl"))

    def _header(self) -> dict[str, Any]:
        return {"kind": "run", "layout": LAYOUT, "identity": self._identity, "next": self._next}

    def _check(self) -> int:
        """Return the number of the next new batch; write the header of a new folder."""
        self._next = 0
        there = self._batches()
        if not self._lines.before:
            if there:
                raise ValueError(f"{self._folder} has batches and no {OPEN}: it is damaged")
            self._lines.append(self._header(), to_disk=True)
            return 0
        header = self._lines.before[0]
        ours = {"layout": LAYOUT, "identity": self._identity}
        theirs = {name: header.get(name) for name in ours}
        if theirs != ours:
            raise ValueError(
                f"{self._folder} is of another run: {theirs}, this one is {ours}; move it away"
            )
        return max([header["next"], *(one + 1 for one in there)])

    def _read_open(self) -> list[OpenGroup]:
        """Return the open groups; those of the last batch may still stand in the file."""
        last = self.recorded(self._next - 1) if self._next else None
        delivered = set() if last is None else {group.id for group in last.groups}
        groups = self._groups(self._lines.before[1:], lambda name: name not in delivered)
        return sorted(groups, key=lambda group: group.number)

    def _groups(
        self, lines: list[dict[str, Any]], wanted: Callable[[str], bool] = lambda name: True
    ) -> list[OpenGroup]:
        groups: dict[str, dict[str, Any]] = {}
        episodes: dict[str, dict[int, dict[str, Any]]] = {}
        for line in lines:
            if line["kind"] == "group":
                groups[line["id"]] = line
            elif line["kind"] == "dropped":
                del groups[line["group"]]
            elif line["kind"] == "episode":
                episodes.setdefault(line["group"], {})[line["index"]] = line
        found = []
        for name, line in groups.items():
            if not wanted(name):
                continue
            task, known = task_from(line["task"]), episodes.get(name, {})
            size = range(line["size"])
            fresh = [
                fresh_episode(self._format, name, index, task, self._identity["seed"])
                for index in size
            ]
            for index, one in known.items():
                fill_episode(self._format, fresh[index], one)
            restarts = [known[index]["restarts"] if index in known else 0 for index in size]
            found.append(OpenGroup(name, line["number"], task, fresh, restarts))
        return found

    def _write(self, lines: list[dict[str, Any]], path: Path) -> CheckedLines:
        """Write a whole file and give it its name; it stays open, and locked."""
        temporary = self._folder / TEMPORARY
        temporary.unlink(missing_ok=True)
        found = CheckedLines(temporary)
        for at, line in enumerate(lines):
            found.append(line, to_disk=at + 1 == len(lines))
        os.replace(temporary, path)
        found.path = path
        _flush_folder(self._folder)
        return found


def _lines_of(groups: Sequence[OpenGroup]) -> Iterator[dict[str, Any]]:
    for group in groups:
        yield group_line(group)
        for index in range(len(group.episodes)):
            yield episode_line(group, index)


def _flush_folder(folder: Path) -> None:
    """Have the disk keep the folder's names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
