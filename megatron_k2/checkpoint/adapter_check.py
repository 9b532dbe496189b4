"""Adapters and checkpoints: which of the two has some, and what to do where they differ.

A checkpoint of a run with ``--k2-lora-rank`` holds base and adapters. Upstream passes over what a
checkpoint holds and the model does not, so that adapters would be dropped without a word, and
fails on a missing key the other way round. Here the first is refused; the second, a base for new
adapters, is what ``--finetune`` is for.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from megatron_k2.adapters import describe_targets, expand_targets, is_adapter, scale_of
from megatron_k2.inputs import UsageError

_bases: set[str] = set()
"""Directories whose checkpoint this process found to have no adapters."""


def require_same_adapters(
    common_state: dict[str, Any], load_dir: str, is_release: bool, args: argparse.Namespace
) -> None:
    """Refuse a checkpoint whose adapters are not the run's.

    Args:
        common_state: what Megatron loads first, with the saved ``args`` in it.
        load_dir: where it came from, ``--load`` say.
        is_release: whether it was converted: it has no iteration to go on from.
        args: the present arguments.

    Raises:
        UsageError: rank, scale or layers differ, or a base is resumed instead of being a start.
    """
    saved, now = _adapters(common_state.get("args")), _adapters(args)
    if saved == now:
        return
    if now is None:
        raise UsageError(
            f"--load {load_dir}: the checkpoint holds adapters that would be lost; give "
            f"{_flags(saved)}"
        )
    if saved is not None:
        raise UsageError(
            f"--load {load_dir}: the checkpoint's adapters are {_flags(saved)}; found {_flags(now)}"
        )
    if not (args.finetune or is_release):
        raise UsageError(
            f"--load {load_dir}: the checkpoint has no adapters; --finetune starts new ones over "
            "it, at iteration 0"
        )
    if load_dir not in _bases and int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_k2: new adapters over {load_dir}", file=sys.stderr, flush=True)
    _bases.add(load_dir)


def drop_new_adapters_(sharded_state_dict: dict[str, Any], load_dir: str) -> None:
    """Ask a checkpoint that has no adapters for the base alone, in place.

    Args:
        sharded_state_dict: what is about to be loaded, by model chunk.
        load_dir: where it comes from.
    """
    if load_dir not in _bases:
        return
    for part in sharded_state_dict.values():
        if isinstance(part, dict):
            for key in [key for key in part if is_adapter(str(key))]:
                del part[key]


Adapters = tuple[int, float, tuple[str, ...]]


def _adapters(args: Any) -> Adapters | None:
    """Return (rank, scale, layers) of a run's arguments, None without adapters."""
    rank = getattr(args, "k2_lora_rank", 0)
    if not rank:
        return None
    return rank, scale_of(rank, args.k2_lora_alpha), expand_targets(args.k2_lora_targets)


def _flags(adapters: Adapters | None) -> str:
    assert adapters is not None
    rank, scale, layers = adapters
    targets = describe_targets(layers).replace(",", "")
    return f"--k2-lora-rank {rank} --k2-lora-alpha {scale * rank:g} --k2-lora-targets {targets}"
