"""Checks a checkpoint before it is loaded, and says which one to take instead.

``_load_base_checkpoint`` is the one door through which ``load_checkpoint`` and
``--use-checkpoint-args`` go. Upstream would fail there in the unpickler, load flipped bits without
notice, or exit with status 0 at an unreadable tracker file. The flag is ``--k2-verify-checkpoint``.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint import adapter_check, load_check
from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[..., Any]) -> Any:
    def _load_base_checkpoint(
        load_dir: str | None,
        args: argparse.Namespace,
        rank0: bool = False,
        sharded_state_dict: dict[str, Any] | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """Verify, load, and refuse a state that fits neither the layout nor the adapters."""
        level = getattr(args, "k2_verify_checkpoint", "full")
        if load_dir is not None and Path(load_dir).is_dir() and rank0:
            load_check.require_intact(load_dir, getattr(args, "ckpt_step", None), level)
        if sharded_state_dict is not None:
            adapter_check.drop_new_adapters_(sharded_state_dict, str(load_dir))
        loaded = original(load_dir, args, rank0, sharded_state_dict, *rest, **kwargs)
        if rank0 and loaded[0] is not None:
            load_check.require_same_layout(loaded[0], args)
            adapter_check.require_same_adapters(loaded[0], str(load_dir), bool(loaded[2]), args)
        return loaded

    return _load_base_checkpoint


def _still_needed() -> bool:
    """Upstream still loads without looking at the files first."""
    source = inspect.getsource(inspect.unwrap(PATCH.original()))
    return "integrity" not in source and "manifest" not in source


PATCH = Patch(
    id="load-verified",
    target="megatron.training.checkpointing:_load_base_checkpoint",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="9a7e9e8de242",
    why="a truncated checkpoint fails in the unpickler and a bit-flipped one loads",
    upstream="megatron/training/checkpointing.py:1633",
    remove_when="upstream verifies by default and names an intact checkpoint",
    still_needed=_still_needed,
)
