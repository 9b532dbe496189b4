"""Presets laid under Megatron's arguments and K2's (flags.py).

``--k2-preset`` only changes defaults: argparse then lets any explicit flag win; what was given
together is checked afterwards (argument_checks.py). Megatron's flags keep their names; ours begin
with ``--k2-`` and have the destination of the configuration field they fill, so that
``core_transformer_config_from_args`` copies them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_k2 import compat, device
from megatron_k2.adapters import add_adapter_flags
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.hf.folder import model_config
from megatron_k2.flags import (
    MUONCLIP,
    SPEC,
    add_model_flags,
    add_optimizer_flags,
    add_run_flags,
    add_yarn_flags,
    extend_recompute_help,
)
from megatron_k2.inputs import UsageError
from megatron_k2.presets import Preset, list_presets, load_preset

MUONCLIP_DEFAULTS: dict[str, Any] = {
    # Kimi K2 (arXiv 2507.20534, section 2.5) and Moonlight (arXiv 2502.16982, section 2).
    "weight_decay": 0.1,
    "muon_momentum": 0.95,
    "muon_nesterov": True,
    "muon_coefficient_type": "kimi",
    "muon_num_ns_steps": None,  # as many as the coefficient set has; the kimi set five
    "muon_extra_scale_factor": 0.2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
}
"""Laid under the flags of a run with ``--optimizer muonclip``; upstream's are another recipe's."""

# What Megatron asks of CUDA by default and the host has not: the extension or kernel named by each.
_HOST_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "pin_memory": False,
}


def add_k2_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Add the ``--k2-*`` flags to Megatron's parser and lay the preset's values as defaults.

    Args:
        parser: a parser that holds Megatron's arguments already.
        argv: the command line to look for ``--k2-preset`` in, ``sys.argv[1:]`` if None.

    Returns:
        The same parser.

    Raises:
        UsageError: the preset is unknown.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    group = parser.add_argument_group(title="k2")
    add_run_flags(group)
    add_model_flags(group)
    extend_recompute_help(parser)
    add_yarn_flags(group)
    add_optimizer_flags(parser)
    add_adapter_flags(parser)
    if device.flag_value("--optimizer", argv) == MUONCLIP:
        parser.set_defaults(**MUONCLIP_DEFAULTS)
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    explicit = _explicit_destinations(parser, argv)
    # Upstream divides by the evaluation interval and gives it no default; 1000 is its old one.
    parser.set_defaults(eval_interval=1000)
    name = device.flag_value("--k2-preset", argv)
    if name is not None and Path(name).is_dir():
        parser.set_defaults(**_model_of("--k2-preset", name, parser))
    elif name is not None:
        parser.set_defaults(**_preset_defaults(_load(name)))
    folder = device.flag_value("--k2-load-hf", argv)
    if folder is not None:
        parser.set_defaults(**_model_of("--k2-load-hf", folder, parser))
    where = device.resolve_device(device.flag_value("--k2-device", argv) or "auto")
    if where == "cpu":
        parser.set_defaults(**_HOST_DEFAULTS)
    elif not compat.te_usable():
        parser.set_defaults(transformer_impl="local", gradient_accumulation_fusion=False)
    elif not compat.apex_usable():  # the output layer is upstream's own, which takes apex's kernel
        parser.set_defaults(gradient_accumulation_fusion=False)
    if not explicit & {"bf16", "fp16"}:
        precision = device.flag_value("--k2-precision", argv) or "auto"
        parser.set_defaults(bf16=_is_bf16(precision, where))
    parser.set_defaults(k2_explicit=tuple(sorted(explicit)))
    _mend_help_(parser)
    return parser


def _mend_help_(parser: argparse.ArgumentParser) -> None:
    """Escape upstream's help texts that hold a bare per cent sign, on which --help would fail."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _refuse_arguments(message: str) -> NoReturn:
    """End with argparse's message in one line, without the usage of 900 flags."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"megatron_k2: error: {message}; --help lists all flags", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _explicit_destinations(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Return the destinations of the flags that the user typed."""
    actions = parser._option_string_actions
    flags = (token.partition("=")[0] for token in argv if token.startswith("--"))
    return {actions[flag].dest for flag in flags if flag in actions}


def _is_bf16(precision: str, where: str) -> bool:
    if precision == "auto":
        return where == "cuda" or device.host_has_fast_bf16()
    return precision == "bf16"


def _preset_defaults(preset: Preset) -> dict[str, Any]:
    defaults = {name: field.value for name, field in preset.fields.items()}
    return {"spec": list(SPEC), "exit_signal_handler": True, **defaults}


def _model_of(flag: str, folder: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the arguments that a folder's config.json gives, as defaults."""
    try:
        found = arguments_from_config(model_config(folder))
    except ConversionRefused as error:
        raise UsageError(f"{flag} {folder}: {error}") from error
    known = {action.dest for action in parser._actions}
    values = {dest: value for dest, value in found.items() if dest in known}
    for dest in ("padded_vocab_size", "mtp_num_layers"):  # follows from flags; left out
        values.pop(dest, None)
    return {"spec": list(SPEC), "exit_signal_handler": True, **values}


def _load(name: str) -> Preset:
    try:
        return load_preset(name)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--k2-preset {name!r} is unknown; known are {', '.join(list_presets())}"
        ) from error
