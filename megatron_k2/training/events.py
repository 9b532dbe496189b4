"""TensorBoard's event files of a training: figures by step, and the arguments it ran with.

Megatron writes all its arguments as texts, so that a folder of event files says what was run. Of a
run that was resumed, whatever the number of files, the later value of a step counts. The stages of
a recipe share a folder; what they save to tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILES = "events.out.tfevents.*"
TEXT_END = "/text_summary"


@dataclass(frozen=True)
class Events:
    """What a run logged.

    Attributes:
        scalars: tag -> step -> value.
        moments: step -> when its last figure was written, in seconds of the epoch.
        arguments: name of an argument -> its value as text, of the last process.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    moments: dict[int, float] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)


def event_folders(root: Path) -> list[Path]:
    """Return the folders with event files, ``root`` and those within, by when they began."""
    files = sorted(root.rglob(FILES), key=lambda path: path.name)
    return list(dict.fromkeys(path.parent for path in files))


def read_events(folder: Path) -> Events:
    """Return all of a folder as one run; nothing where it holds no event file."""
    return _joined([_read(path) for path in sorted(folder.glob(FILES))])


def read_runs(folder: Path) -> list[Events]:
    """Return the runs of a folder, in the order in which they began: one for each ``--save``."""
    by_save: dict[str, list[Events]] = {}
    for path in sorted(folder.glob(FILES)):  # names begin with the time
        found = _read(path)
        by_save.setdefault(found.arguments.get("save", ""), []).append(found)
    return [_joined(parts) for parts in by_save.values()]


def _joined(parts: Sequence[Events]) -> Events:
    joined = Events()
    for one in parts:
        for tag, values in one.scalars.items():
            joined.scalars.setdefault(tag, {}).update(values)
        joined.moments.update(one.moments)
        joined.arguments.update(one.arguments)
    return joined


def _read(path: Path) -> Events:
    """Return one file: what one process wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    found = Events()
    for tag in accumulator.Tags()["scalars"]:
        events = sorted(accumulator.Scalars(tag), key=lambda event: event.wall_time)
        found.scalars[tag] = {event.step: event.value for event in events}
        for event in events:
            found.moments[event.step] = max(event.wall_time, found.moments.get(event.step, 0.0))
    for tag in accumulator.Tags()["tensors"]:
        if tag.endswith(TEXT_END):
            value = b"".join(accumulator.Tensors(tag)[-1].tensor_proto.string_val)
            found.arguments[tag.removesuffix(TEXT_END)] = value.decode("utf-8", errors="replace")
    return found
