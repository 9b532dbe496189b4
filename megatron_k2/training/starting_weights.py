"""Weights that a run starts from: a released folder's (``--k2-load-hf``), adapters of PEFT's form.

Both are hooks of Megatron's model builder, called between wrapping the model and building the
optimizer. A checkpoint of the run's own, in ``--load``, wins over the folder: Megatron loads it
later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_k2.checkpoint import intact
from megatron_k2.checkpoint.load_hf import LoadHF
from megatron_k2.checkpoint.load_peft import LoadPeft


def add_load_hooks_(args: Any, model_config: Any) -> None:
    """Have the model that is built of a configuration filled with the weights that flags name.

    Args:
        args: Megatron's validated arguments.
        model_config: upstream's ``GPTModelConfig``; its ``post_wrap_hooks`` are added to.
    """
    if args.k2_load_hf and not _has_checkpoint(args.load):
        model_config.post_wrap_hooks.append(LoadHF(Path(args.k2_load_hf)))
    if args.k2_lora_load:
        model_config.post_wrap_hooks.append(LoadPeft(Path(args.k2_lora_load), vars(args)))


def _has_checkpoint(load_dir: str | None) -> bool:
    """Tell whether Megatron is about to load weights over those of ``--k2-load-hf``."""
    return bool(load_dir) and (Path(str(load_dir)) / intact.TRACKER).is_file()
