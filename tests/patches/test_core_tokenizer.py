"""The tokenizer patches change what they claim; the tokenizer itself is in tests/unit/data."""

from __future__ import annotations

import argparse

import pytest

import megatron_k2
from megatron_k2.data.kimi_tokenizer import TOKENIZER_TYPE
from megatron_k2.patches.megatron_core import kimi_tokenizer

megatron_k2.register("cpu")
NAME, BUILDER = kimi_tokenizer.PATCHES
FLAGS = ["--tokenizer-type", TOKENIZER_TYPE]


def test_parser_gains_the_name_and_loses_none(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.training import arguments

    upstream = NAME.original()(argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        upstream.parse_args(FLAGS)
    assert "invalid choice" in capsys.readouterr().err
    ours = arguments._add_tokenizer_args(argparse.ArgumentParser())
    assert ours.parse_args(FLAGS).tokenizer_type == TOKENIZER_TYPE
    choices = [parser._option_string_actions[FLAGS[0]].choices for parser in (upstream, ours)]
    assert [*choices[0], TOKENIZER_TYPE] == choices[1]


def test_builder_serves_the_name_and_leaves_others_to_upstream() -> None:
    from megatron.core.tokenizers.text.models import DefaultTokenizerText
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from megatron_k2.inputs import UsageError

    args = argparse.Namespace(
        tokenizer_type=TOKENIZER_TYPE, tokenizer_model=None, vocab_size=7, pad_vocab_size=False
    )
    with pytest.raises(ValueError, match="is not supported"):
        BUILDER.original()(args)
    with pytest.raises(UsageError, match="give --tokenizer-model"):
        build_tokenizer(args)
    args.tokenizer_type = "NullTokenizer"
    assert isinstance(build_tokenizer(args), DefaultTokenizerText)


def test_training_holds_the_patched_builder() -> None:
    from megatron.training import global_vars

    assert global_vars.build_tokenizer.__wrapped__ is BUILDER.original()
