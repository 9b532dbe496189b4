"""A trained model opened for use, with nothing but its folder.

A checkpoint's own arguments say what the model and its tokenizer are; they become the defaults of
Megatron's parser, and any flag given wins. Parallel layout, batch sizes, optimizer and data of the
run that saved it are left behind. A Hugging Face folder (--k2-load-hf) says the same in its
config.json. One process, unless a launcher has set the environment of several.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.torch_dist.folder import open_folder, resolve
from megatron_k2.flags import SPEC
from megatron_k2.inputs import UsageError
from megatron_k2.training.launch import free_port

_RUN_ONLY = frozenset(
    {
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "lr", "min_lr"),
        *("dist_ckpt_optim_fully_reshardable", "moe_token_dispatcher_type", "transformer_impl"),
    }
)
"""Fields of a preset that say how to train, or on what, and not what the model is."""
_BESIDE_PRESETS = (
    *("tokenizer_type", "tokenizer_model", "qk_layernorm", "kv_channels", "rotary_percent"),
    "add_position_embedding",  # what comes from Hugging Face has none
    *("k2_lora_rank", "k2_lora_alpha", "k2_lora_targets", "k2_lora_seed", "num_query_groups"),
    *("group_query_attention", "moe_layer_recompute", "rotary_interleaved", "bf16", "fp16"),
)

_HF_CONTEXT = 4096
"""Tokens of a context unless --max-context or --seq-length says otherwise: config.json says
how many positions there are, not how many the machine's memory holds. K2's pre-training length."""


@dataclass(frozen=True)
class OpenedModel:
    """A model with its arguments and tokenizer.

    Attributes:
        model: the unwrapped GPTModel of this process, in eval mode.
        args: Megatron's validated arguments.
        tokenizer: Megatron's.
    """

    model: Any
    args: Any
    tokenizer: Any


def saved_model_arguments(folder: str | Path) -> dict[str, Any]:
    """Return the arguments of a checkpoint's run that say what the model is, by destination.

    Raises:
        ConversionRefused: there is no checkpoint.
        UsageError: it does not hold its arguments.
    """
    from megatron_k2.presets import list_presets, load_preset

    saved = open_folder(resolve(folder)).arguments
    if "num_layers" not in saved:
        raise UsageError(f"--load {folder}: holds no arguments; give --k2-preset and its flags")
    fields = {key for name in list_presets() for key in load_preset(name).fields}
    wanted = (fields - _RUN_ONLY) | set(_BESIDE_PRESETS)
    plain = (bool, int, float, str, list, tuple)
    found = {
        key: saved[key]
        for key in sorted(wanted)
        if saved.get(key) is not None and isinstance(saved[key], plain)
    }
    if "seq_length" not in found:  # converted, not trained: as of a Hugging Face folder
        found["seq_length"] = min(found.get("max_position_embeddings", _HF_CONTEXT), _HF_CONTEXT)
    return found | dict(spec=list(SPEC))


def open_model(
    load: str | None, load_hf: str | None, flags: Sequence[str] = (), quiet: bool = True
) -> OpenedModel:
    """Build a model, load its weights and return it with its tokenizer.

    Args:
        load: folder of a Megatron checkpoint, or None.
        load_hf: Hugging Face folder, or None; one of the two.
        flags: of Megatron's parser; they win over what the folder says.
        quiet: hide what Megatron prints.

    Raises:
        UsageError: neither or both folders, or flags that cannot be.
        ConversionRefused: a folder that is none.

    Collective: initialises the process groups - every rank must call.
    """
    if bool(load) == bool(load_hf):
        raise UsageError("give one of --load DIR (Megatron checkpoint) and --k2-load-hf DIR")
    if load:
        defaults = saved_model_arguments(load)
        if "tokenizer_model" in defaults:
            defaults["tokenizer_model"] = _found_again(defaults["tokenizer_model"], Path(load))
    else:
        defaults = _hf_defaults(Path(str(load_hf)))
    defaults |= dict(no_load_optim=True, no_load_rng=True, micro_batch_size=1)
    argv = ["--load", str(load)] if load else ["--k2-load-hf", str(load_hf)]
    _alone_without_launcher()
    before, sys.argv = sys.argv, [sys.argv[0], *argv, *flags]
    shown = contextlib.redirect_stdout(io.StringIO() if quiet else sys.stderr)
    try:
        with shown:
            return _open(defaults)
    finally:
        sys.argv = before


def _open(defaults: dict[str, Any]) -> OpenedModel:
    """Parse ``sys.argv`` over defaults and build what it describes."""
    import megatron_k2

    megatron_k2.register()
    from megatron.training import get_tokenizer
    from megatron.training.arguments import parse_and_validate_args

    from megatron_k2.training.sample import load_model

    def lay_under(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{key: value for key, value in defaults.items() if key in known})
        return parser

    args = parse_and_validate_args(lay_under)
    model = load_model(args) if args.load else _from_hf(args)
    return OpenedModel(model, args, get_tokenizer())


def _from_hf(args: Any) -> Any:
    """Build the model of the arguments with the weights of --k2-load-hf; unwrapped, eval mode."""
    from megatron.core.utils import unwrap_model

    from megatron_k2.checkpoint.load_hf import LoadHF
    from megatron_k2.training.sample import build_model

    return unwrap_model(build_model(args, LoadHF(Path(args.k2_load_hf))))[0].eval()


def _hf_defaults(folder: Path) -> dict[str, Any]:
    """Return the arguments of a Hugging Face folder that its shape does not give.

    Raises:
        UsageError: it has no config.json.
    """
    kind = "KimiTiktokenTokenizer" if (folder / "tiktoken.model").is_file() else ""
    found = dict(tokenizer_type=kind or "HuggingFaceTokenizer", tokenizer_model=str(folder))
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise UsageError(f"--k2-load-hf {folder}: {error}") from error
    positions = config.get("max_position_embeddings", _HF_CONTEXT)
    return found | dict(seq_length=min(positions, _HF_CONTEXT), max_position_embeddings=positions)


def _found_again(path: str, checkpoint: Path) -> str:
    """Return a run's path as it is reached from here: as it is, or from a folder above its own.

    Runs are started elsewhere and moved; ``tokens/tokenizer.model`` beside the checkpoints is where
    ``make pretrain`` puts it.
    """
    if Path(path).exists():
        return path
    tail = Path(*Path(path).parts[-2:])
    above = checkpoint.resolve().parents
    places = [folder / path for folder in above] + [folder / tail for folder in above]
    return str(next((place for place in places if place.exists()), path))


def _alone_without_launcher() -> None:
    """Set the environment of a world of one process where no launcher has set it."""
    if "RANK" not in os.environ:
        port = str(free_port())
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
