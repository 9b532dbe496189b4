"""What a run leaves behind: figures a step, episodes to read, and the state of a checkpoint.

``metrics.jsonl`` has a line a step. After a restart lines beyond the checkpoint are dropped, so
that each step is there once. The state of sampler and rollouts is written before Megatron's
checkpoint of the same step becomes valid (its tracker file), so that one never exists without the
other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class RunFolder:
    """The folder of ``--save``; only rank 0 writes figures, every leader its state.

    Args:
        path: the folder; None: nothing is written.
        writes: whether this process writes figures.
        tensorboard: a ``SummaryWriter``, or None.
    """

    def __init__(self, path: Path | None, writes: bool, tensorboard: Any = None) -> None:
        self._path, self._writes = path, writes and path is not None
        self._tensorboard = tensorboard
        if path is not None:
            (path / "rl").mkdir(parents=True, exist_ok=True)

    def begin(self, step: int) -> None:
        """Drop the figures of a step and later ones: they come again."""
        if not self._writes or not (path := self._file(METRICS)).is_file():
            return
        lines = path.read_text(encoding="utf-8").split("\n")
        kept = [line for line in lines if _is_before(line, step)]
        _publish(path, "".join(f"{line}\n" for line in kept))

    def write(self, figures: dict[str, Any]) -> None:
        """Append a line of figures."""
        if self._writes:
            with self._file(METRICS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(figures) + "\n")
        if self._tensorboard is not None:
            for name, value in flat(figures).items():
                self._tensorboard.add_scalar(f"rl/{name}", value, figures["step"])

    def save_state(self, step: int, name: str, state: dict[str, Any]) -> None:
        """Write a part of a checkpoint's state, whole or not at all."""
        if self._path is not None:
            _publish(self._state(step, name), json.dumps(state))

    def load_state(self, step: int, name: str) -> dict[str, Any]:
        """Return a part of a checkpoint's state.

        Raises:
            ValueError: it is not there.
        """
        path = self._state(step, name)
        if not path.is_file():
            raise ValueError(f"--load: the checkpoint of step {step} has no {path}")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _file(self, name: str) -> Path:
        assert self._path is not None
        return self._path / "rl" / name

    def _state(self, step: int, name: str) -> Path:
        assert self._path is not None
        return self._path / "rl" / f"state_{step:07d}_{name}.json"


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested figures by path; the step is no figure."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = value
    return found


def _is_before(line: str, step: int) -> bool:
    """Tell whether a line is whole and of an earlier step."""
    try:
        return int(json.loads(line)["step"]) < step
    except (ValueError, KeyError):
        return False


def _publish(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
