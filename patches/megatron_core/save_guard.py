"""A checkpoint that cannot be saved does not end the training; the tracker file is never torn.

``save_checkpoint`` is framed by the two collective points of ``save_outcome``. Upstream opens the
tracker file with mode "w": a kill between its truncation and its write leaves an empty file, at
which the next start exits with status 0, and a full disk does the same.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

from megatron_k2.checkpoint import intact, save_outcome
from megatron_k2.patches.patch import Patch


def _guarded(original: Callable[..., None]) -> Any:
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; on failure report it and return."""
        from torch.distributed.checkpoint import CheckpointException

        directory = _directory(iteration, kwargs)
        if directory is None:
            return original(iteration, *args, **kwargs)
        error = None
        if started := save_outcome.begin(directory):
            try:
                original(iteration, *args, **kwargs)
            except (CheckpointException, save_outcome.SaveFailed) as failure:
                error = failure
        if error is not None or not started or not _is_async():
            save_outcome.settle(error=error)
        return None

    return save_checkpoint


def _is_async() -> bool:
    from megatron.training.global_vars import get_args

    return get_args().async_save


def _directory(iteration: int, kwargs: dict[str, Any]) -> str | None:
    """Return the directory that will be written, or None for a format without a guard."""
    from megatron.training import checkpointing
    from megatron.training.global_vars import get_args

    args = get_args()
    if args.ckpt_format != "torch_dist" or kwargs.get("non_persistent_ckpt"):
        return None
    release = kwargs.get("release", False)
    return checkpointing.get_checkpoint_name(args.save, iteration, release, return_base_dir=True)


class _AtomicTracker:
    """Megatron's file access, in which the tracker file is replaced and not rewritten."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file; a tracker file opened for writing appears when it is complete."""
        if mode == "w" and os.path.basename(str(path)) == intact.TRACKER and "://" not in str(path):
            return _publish(str(path))
        return self._original.open(path, mode, *args, **kwargs)


@contextlib.contextmanager
def _publish(path: str) -> Iterator[io.StringIO]:
    text = io.StringIO()
    yield text
    try:
        intact.publish_text(path, text.getvalue())
    except OSError as error:
        save_outcome.note_failure(path, error)


def _not_guarded() -> bool:
    """Upstream's ``save_checkpoint`` still lets every error through."""
    return "CheckpointException" not in inspect.getsource(inspect.unwrap(PATCHES[0].original()))


def _tracker_is_torn() -> bool:
    """Upstream still truncates the tracker file before it writes."""
    source = inspect.getsource(inspect.unwrap(PATCHES[0].original()))
    return "maybe_msc.open(tracker_filename, 'w')" in source


_RANGE = {"distribution": "megatron-core", "min_version": "0.19.0", "max_version": "0.19.2"}

PATCHES = (
    Patch(
        id="save-guard",
        target="megatron.training.checkpointing:save_checkpoint",
        replacement=_guarded,
        fingerprint="b652984ca8c8",
        why="a full disk or a missing permission ends the training or hangs it",
        upstream="megatron/training/checkpointing.py:552",
        remove_when="upstream logs a failed save and continues",
        still_needed=_not_guarded,
        importers=("megatron.training.training",),
        **_RANGE,
    ),
    Patch(
        id="tracker-file",
        target="megatron.training.checkpointing:maybe_msc",
        replacement=_AtomicTracker,
        fingerprint="builtin",
        why="a kill or a full disk while the tracker file is written leaves it empty",
        upstream="megatron/training/checkpointing.py:946",
        remove_when="upstream writes the tracker file by rename",
        still_needed=_tracker_is_torn,
        importers=None,
        **_RANGE,
    ),
)
