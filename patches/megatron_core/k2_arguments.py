"""Megatron's argument parser, configuration class and validation, with K2's added.

Four patches, because the stock script calls ``parse_and_validate_args`` without a place to add
arguments: the parser gains the ``--k2-*`` flags and the preset's defaults, the validation is framed
by ours, ``core_transformer_config_from_args`` builds ``K2TransformerConfig``, and the tokenizer is
held against the model and the data once it is built. All are inert for a run without K2 flags.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _with_k2_arguments(original: Callable[..., argparse.ArgumentParser]) -> Any:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add Megatron's arguments, then K2's, then the preset's defaults."""
        from megatron_k2 import arguments

        return arguments.add_k2_args(original(parser))

    return add_megatron_arguments


def _with_k2_validation(original: Callable[..., Any]) -> Any:
    def validate_args(args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Any:
        """Check K2's rules, then Megatron's, then derive what K2 derives."""
        from megatron_k2 import argument_checks
        from megatron_k2.inputs import UsageError
        from megatron_k2.upstream_errors import REFUSALS, explain

        argument_checks.validate_k2_args(args)
        try:
            validated = original(args, defaults or {})
        except REFUSALS as error:
            message = explain(error)
            if message is None:
                raise
            raise UsageError(message) from error
        argument_checks.finish_k2_args(args)
        return validated

    return validate_args


def _with_k2_config(original: type) -> Any:
    from megatron_k2.model.config import K2TransformerConfig

    return K2TransformerConfig


def _with_k2_vocabulary(original: Callable[..., None]) -> Any:
    def _build_tokenizer(args: argparse.Namespace) -> None:
        """Build the tokenizer, then check the vocabulary."""
        from megatron.training.global_vars import get_tokenizer

        from megatron_k2.inputs import UsageError, check_vocabulary
        from megatron_k2.upstream_errors import REFUSALS, explain

        try:
            original(args)
        except REFUSALS as error:
            message = explain(error)
            if message is None:
                raise
            given = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model"
            raise UsageError(f"{given} {args.tokenizer_model}: {message}") from error
        check_vocabulary(args, get_tokenizer())

    return _build_tokenizer


def _vocabulary_unchecked() -> bool:
    """Upstream pads the tokenizer's vocabulary and compares it with nothing."""
    from megatron.core.tokenizers.utils import build_tokenizer

    return "raise" not in inspect.getsource(build_tokenizer._set_padded_vocab_size)


def _no_hook() -> bool:
    """The stock script still gives extensions no way to add arguments."""
    from megatron.training import arguments

    return "entry_points" not in inspect.getsource(arguments.parse_args)


def _config_is_fixed() -> bool:
    """MLA still overrides the configuration class that a caller asks for."""
    from megatron.training import argument_utils

    source = inspect.getsource(argument_utils.core_transformer_config_from_args)
    return "config_class = MLATransformerConfig" in source


_RANGE = {"distribution": "megatron-core", "min_version": "0.19.0", "max_version": "0.19.2"}

PATCHES = (
    Patch(
        id="k2-arguments",
        target="megatron.training.arguments:add_megatron_arguments",
        replacement=_with_k2_arguments,
        fingerprint="580b80fbe586",
        why="the unmodified pretrain_gpt.py has to accept --k2-preset",
        upstream="megatron/training/arguments.py:45",
        remove_when="Megatron loads argument providers from an entry point",
        still_needed=_no_hook,
        **_RANGE,
    ),
    Patch(
        id="k2-validation",
        target="megatron.training.arguments:validate_args",
        replacement=_with_k2_validation,
        fingerprint="47bfcd3af0d8",
        why="K2's checks must come before Megatron's asserts, which name no flag",
        upstream="megatron/training/arguments.py:388",
        remove_when="Megatron loads argument providers from an entry point",
        still_needed=_no_hook,
        **_RANGE,
    ),
    Patch(
        id="k2-config",
        target="megatron.core.transformer:MLATransformerConfig",
        replacement=_with_k2_config,
        fingerprint="5ee072f3d8bc",
        why="with MLA, core_transformer_config_from_args ignores the config class it is given",
        upstream="megatron/training/argument_utils.py:291",
        remove_when="config_class wins over multi_latent_attention",
        still_needed=_config_is_fixed,
        importers=None,
        **_RANGE,
    ),
    Patch(
        id="k2-vocabulary",
        target="megatron.training.global_vars:_build_tokenizer",
        replacement=_with_k2_vocabulary,
        fingerprint="4f6e73c7794f",
        why="a vocabulary that differs from preset or data ends in an index error, or in nothing",
        upstream="megatron/training/global_vars.py:196",
        remove_when="upstream compares tokenizer, model and data",
        still_needed=_vocabulary_unchecked,
        **_RANGE,
    ),
)
