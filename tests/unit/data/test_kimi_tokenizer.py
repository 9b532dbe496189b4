"""Kimi's tokenizer inside Megatron: its own parser, builder, dataset and stock tokenising tool."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_k2
from megatron_k2.chat.tokenizer import KimiTokenizer
from megatron_k2.data.kimi_tokenizer import TOKENIZER_TYPE, KimiMegatronTokenizer
from megatron_k2.inputs import UsageError
from tests.unit.chat.kimi_files import TEMPLATE, write_tokenizer

megatron_k2.register("cpu")
TEXTS = [
    "The first document, with <|im_end|> and [EOS] as text.\n",
    "def encode(self, text):\n\treturn 1234567\n" * 4,
    "你好世界 café 😀",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("release"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def parsed(*flags: str) -> argparse.Namespace:
    """Arguments as stock tools/preprocess_data.py makes them."""
    from megatron.training.arguments import _add_tokenizer_args

    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(list(flags))
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
    return args


def build(folder: Path) -> Any:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    flags = ["--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", str(folder)]
    return build_tokenizer(parsed(*flags))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return build(folder)


@pytest.fixture(scope="module")
def kimi(folder: Path) -> KimiTokenizer:
    return KimiTokenizer(folder)


def write_indexed(tokenizer: Any, prefix: Path) -> None:
    """Write documents with what preprocess_data.py calls."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in TEXTS:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_megatrons_builder_gives_it_with_the_padded_vocabulary(folder, kimi) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = parsed("--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", str(folder))
    found = build_tokenizer(args)
    assert isinstance(found, KimiMegatronTokenizer)
    assert args.padded_vocab_size == -(-kimi.vocab_size // 128) * 128
    assert found.vocab_size == kimi.vocab_size
    assert (found.eod, found.eos, found.bos) == (kimi.eos_id, kimi.eos_id, kimi.bos_id)
    assert (found.pad, found.unk) == (kimi.pad_id, kimi.unk_id)


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_tokens_go_there_and_back(tokenizer, kimi, text: str) -> None:
    ids = tokenizer.tokenize(text)
    assert ids == kimi.encode(text)
    assert tokenizer.detokenize(ids) == text
    library = tokenizer._tokenizer
    assert library.tokens_to_ids(library.text_to_tokens(text)) == ids
    assert library.tokens_to_text(library.text_to_tokens(text)) == text
    assert library.ids_to_tokens(ids) == [tokenizer.inv_vocab[token] for token in ids]


def test_every_token_has_a_name_of_its_own(tokenizer, kimi) -> None:
    assert len(tokenizer.vocab) == kimi.vocab_size
    assert tokenizer.vocab["<|im_end|>"] == kimi.special_id("<|im_end|>")
    assert tokenizer._tokenizer.tokens_to_ids(["no token"]) == [kimi.unk_id]
    ids = tokenizer.additional_special_tokens_ids
    assert kimi.special_id("<|im_middle|>") in ids and kimi.eos_id not in ids


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_where_tokens_begin(tokenizer, kimi, text: str) -> None:
    ids = tokenizer.tokenize(text)
    assert tokenizer.offsets(ids, text) == kimi._encoding.decode_with_offsets(ids)[1]


def test_special_tokens_are_shown_or_skipped(tokenizer, kimi) -> None:
    ids = [*tokenizer.tokenize("word"), kimi.special_id("<|im_end|>"), tokenizer.eod]
    assert tokenizer.detokenize(ids) == "word<|im_end|>[EOS]"
    assert tokenizer.detokenize(ids, skip_special_tokens=True) == "word"
    with pytest.raises(NotImplementedError, match="no room for more special tokens"):
        tokenizer.add_special_tokens(["<new>"])


def test_the_folders_chat_template_gives_control_tokens(tokenizer, kimi) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids == kimi.encode(text, control_tokens=True)
    assert ids[0] == kimi.special_id("<|im_system|>")
    assert text.endswith("b<|im_end|><|im_assistant|>assistant<|im_middle|>")
    assert tokenizer.apply_chat_template(messages, truncation=True, max_length=2) == ids[:2]
    assert tokenizer.apply_chat_template(messages, "{{ x }}", tokenize=False, x="y") == "y"


def test_a_bare_rank_file_takes_nothing_from_its_neighbours(folder, tmp_path) -> None:
    bare = tmp_path / "small.tiktoken"
    bare.write_bytes((folder / "tiktoken.model").read_bytes())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("another tokenizer's")
    assert build(bare).chat_template is None


def test_caches_follow_the_content_and_not_the_place(folder, tmp_path, tokenizer) -> None:
    same, other = (
        write_tokenizer(tmp_path / "a"),
        write_tokenizer(tmp_path / "b", eos_token="[EOT]"),
    )
    assert build(same).unique_identifiers == tokenizer.unique_identifiers
    assert build(other).unique_identifiers != tokenizer.unique_identifiers
    json.dumps(tokenizer.unique_identifiers)


def test_wrong_input_is_a_usage_error_that_names_the_file_or_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiktoken\.model: No such file"):
        build(tmp_path)
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    with pytest.raises(UsageError, match="give --tokenizer-model"):
        build_tokenizer(parsed("--tokenizer-type", TOKENIZER_TYPE))


def test_gpt_dataset_reads_what_was_written_and_masks_the_ends(tmp_path, tokenizer) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefix = tmp_path / "documents"
    write_indexed(tokenizer, prefix)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=16, blend=([str(prefix)], None), split="1,0,0",
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=True,
        reset_attention_mask=True, eod_mask_loss=True, tokenizer=tokenizer,
    )  # fmt: skip
    dataset, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [4, 0, 0], lambda: True, config
    ).build()
    tokens = {tuple(dataset[row]["tokens"].tolist()) for row in range(len(dataset))}
    whole = [[*tokenizer.tokenize(text), tokenizer.eod] for text in TEXTS]
    orders = [list(itertools.chain(*order)) for order in itertools.permutations(whole)]
    sixteens = {tuple(order[i : i + 16]) for order in orders for i in range(len(order) - 15)}
    assert tokens and tokens <= sixteens
    for row in range(len(dataset)):
        sample = dataset[row]
        ends = sample["tokens"] == tokenizer.eod
        assert (sample["loss_mask"][ends] == 0).all() and (sample["loss_mask"][~ends] == 1).all()
    assert any((dataset[row]["tokens"] == tokenizer.eod).any() for row in range(len(dataset)))


@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)
def test_stock_preprocess_data_writes_these_bytes(folder, tmp_path, tokenizer) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    write_indexed(tokenizer, tmp_path / "ours")
    tool = Path(os.environ["MEGATRON_LM_PATH"]) / "tools" / "preprocess_data.py"
    command = [sys.executable, "-m", "megatron_k2", "--k2-megatron", "wheel", str(tool)]
    command += ["--input", str(tmp_path / "c.jsonl"), "--output-prefix", str(tmp_path / "stock")]
    command += ["--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", str(folder)]
    command += ["--append-eod", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for suffix in (".bin", ".idx"):
        stock = (tmp_path / f"stock_text_document{suffix}").read_bytes()
        assert stock == (tmp_path / f"ours{suffix}").read_bytes()
