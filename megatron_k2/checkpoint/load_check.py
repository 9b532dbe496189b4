"""What is checked before a checkpoint is loaded, with all ranks reading their share of the files.

A damaged checkpoint is refused with the file's name and the flags that load the newest intact one.
So is an optimizer state that the present layout cannot take: upstream names a flag there that has
no such effect (``--ckpt-fully-parallel-save``), or fails on a missing key.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from megatron_k2.checkpoint import intact

_verified: set[tuple[str, int | str]] = set()
# Layout arguments that only a fully reshardable optimizer state survives.
_LAYOUT_FLAGS = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
}


def require_intact(save_dir: str, iteration: int | None, level: str = "full") -> None:
    """Refuse a checkpoint whose files are not what its manifest says.

    Args:
        save_dir: the directory given with ``--load``.
        iteration: ``--ckpt-step``, or None for what the tracker file names.
        level: ``full``, ``size`` or ``off``. Before the process group exists every process would
            read all files, so that only sizes are compared then.

    Raises:
        DamagedCheckpointError: on all ranks, with the first damaged file and a way out.
    Collective: over all ranks if torch.distributed is initialised - every rank must call.
    """
    if level == "off":
        return
    distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else int(os.environ.get("RANK", "0"))
    asked = iteration or _tracked_iteration(save_dir, is_first=rank == 0)
    if asked is None or (save_dir, asked) in _verified:
        return
    directory = _directory(save_dir, asked)
    if rank == 0:
        intact.restore_replaced(directory)
    _broadcast(None)  # nobody reads before the directory is in place
    if not distributed:
        problems = intact.verify_directory(directory, "size")
    else:
        problems = _verify_together(directory, level)
    if problems:
        offered = intact.offer(save_dir, level) if rank == 0 or not distributed else None
        way_out = _broadcast(offered)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise intact.DamagedCheckpointError(
            f"checkpoint of {_name(asked)} in {save_dir} is damaged: {problems[0]}{more}; {way_out}"
        )
    if distributed:
        _verified.add((save_dir, asked))
        if rank == 0 and not (directory / intact.MANIFEST).is_file():
            print(
                f"note: checkpoint {asked} in {save_dir} has no manifest, so that its files "
                "are loaded unverified (it was saved without megatron_k2)",
                flush=True,
            )


def require_same_layout(common_state: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse an optimizer state that is bound to the layout it was saved in.

    Args:
        common_state: what Megatron loads first: the saved ``args`` and ``content_metadata``.
        args: the present arguments.

    Raises:
        LayoutMismatchError: it is, and the layout has changed; with both values and the flags.
    """
    saved = common_state.get("args")
    metadata = common_state.get("content_metadata") or {}
    kind = metadata.get("distrib_optim_sharding_type")
    skipped = args.no_load_optim or args.finetune or getattr(saved, "no_save_optim", False)
    if saved is None or kind != "dp_reshardable" or skipped:
        return
    for name, flag in _LAYOUT_FLAGS.items():
        before, now = getattr(saved, name, None), getattr(args, name, None)
        if before != now:
            raise intact.LayoutMismatchError(
                f"{flag} {now}: the checkpoint was saved with {before} and its optimizer state "
                f"fits no other value; use {flag} {before}, or save it there once more with "
                "--dist-ckpt-optim-fully-reshardable, or drop the state with --no-load-optim"
            )


def forget() -> None:
    """Verify again what this process has verified; for tests that damage files."""
    _verified.clear()


def _name(iteration: int | str) -> str:
    return f"iteration {iteration}" if isinstance(iteration, int) else f"the {iteration}"


def _directory(save_dir: str, iteration: int | str) -> Path:
    """Return the directory of an iteration or of a release."""
    if iteration == intact.RELEASE:
        return Path(save_dir) / intact.RELEASE
    return intact.iteration_directory(save_dir, int(iteration))


def _tracked_iteration(save_dir: str, is_first: bool) -> int | str | None:
    """Return what the tracker file names, a number or ``release``; None if there is none.

    Args:
        save_dir: directory of the tracker file.
        is_first: whether this process speaks for all.

    Raises:
        DamagedCheckpointError: it names nothing.
    """
    tracker = Path(save_dir) / intact.TRACKER
    if not tracker.is_file():
        newest = intact.find_newest_intact(save_dir, "size")
        if newest is not None and is_first:
            print(
                f"note: {tracker} is missing, so that training starts anew; "
                f"{intact.offer(save_dir, 'size')}",
                flush=True,
            )
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == intact.RELEASE:
        return text
    if not text.isdigit():
        raise intact.DamagedCheckpointError(
            f"{tracker} names no iteration but {text!r}; {intact.offer(save_dir, 'size')}"
        )
    return int(text)


def _verify_together(directory: Path, level: str) -> list[str]:
    """Return the problems that all ranks found, each in its share of the files."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[Any] = [None] * world_size
    mine = intact.verify_directory(directory, level, share=(rank, world_size))
    torch.distributed.all_gather_object(found, mine)
    return sorted({problem for problems in found for problem in problems})


def _broadcast(value: str | None) -> str | None:
    """Return rank 0's value on all ranks."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
