"""``--tokenizer-type KimiTiktokenTokenizer`` among Megatron's tokenizers.

Upstream's lists of names can be extended, but ``build_tokenizer`` sends an unknown name nowhere,
and the parser's choices are fixed. Two patches on what every script calls, ``preprocess_data.py``
included: the parser gains the name, the builder serves it. Any other name goes to the original.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch

_NAME = "KimiTiktokenTokenizer"


def _with_name(original: Callable[..., argparse.ArgumentParser]) -> Any:
    def _add_tokenizer_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add upstream's tokenizer arguments, and ours to the choices of the type."""
        parser = original(parser)
        action = parser._option_string_actions["--tokenizer-type"]
        action.choices = [*(action.choices or ()), _NAME]
        return parser

    return _add_tokenizer_args


def _with_builder(original: Callable[..., Any]) -> Any:
    def build_tokenizer(args: Any, **kwargs: Any) -> Any:
        """Build Kimi's tokenizer for its name, upstream's for any other."""
        if args.tokenizer_type != _NAME:
            return original(args, **kwargs)
        from megatron_k2.data import kimi_tokenizer

        return kimi_tokenizer.build(args)

    return build_tokenizer


def _choices_are_fixed() -> bool:
    """The parser still takes its choices from a Literal."""
    from megatron.training.config import training_config

    source = inspect.getsource(training_config.TokenizerConfig)
    return "tokenizer_type: Literal[" in source and _NAME not in source


def _builder_is_closed() -> bool:
    """The builder still knows its names by an if for each."""
    source = inspect.getsource(PATCHES[1].original())
    return "elif args.tokenizer_type == 'TikTokenizer'" in source and _NAME not in source


_RANGE = {"distribution": "megatron-core", "min_version": "0.19.0", "max_version": "0.19.2"}

PATCHES = (
    Patch(
        id="kimi-tokenizer-type",
        target="megatron.training.arguments:_add_tokenizer_args",
        replacement=_with_name,
        fingerprint="a15502bf8674",
        why="the parser refuses a tokenizer type that is not in upstream's list",
        upstream="megatron/training/arguments.py:3076",
        remove_when="the choices of --tokenizer-type can be extended",
        still_needed=_choices_are_fixed,
        **_RANGE,
    ),
    Patch(
        id="kimi-tokenizer",
        target="megatron.core.tokenizers.utils.build_tokenizer:build_tokenizer",
        replacement=_with_builder,
        fingerprint="8f75e55822c6",
        why="a registered tokenizer library cannot be named by --tokenizer-type",
        upstream="megatron/core/tokenizers/utils/build_tokenizer.py:26",
        remove_when="build_tokenizer looks its type up in a registry",
        still_needed=_builder_is_closed,
        importers=("megatron.training.global_vars",),
        **_RANGE,
    ),
)
