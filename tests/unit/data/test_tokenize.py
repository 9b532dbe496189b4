"""Tokenizer training and `.bin/.idx` writing, against upstream's readers and its own tool."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_k2.data.corpus import Corpus, build_corpus, write_corpus
from megatron_k2.data.documents import Document, read_python_library
from megatron_k2.data.tokenize import (
    EOD_ID,
    load_tokenizer,
    read_texts,
    train_tokenizer,
    write_indexed,
)
from megatron_k2.data.windows import read_windows

VOCAB = 2048
HARD_TEXTS = [
    "def f(x):\n\treturn  x\n\n\n",
    "</s><s><unk><0x0A> is text, not control",
    "日本語 \U0001f600 naïve \r\n",
    " leading and trailing ",
    "a\0b",
    "9" * 50,
]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    taken: list[Document] = []
    for document in read_python_library():
        if document.name.startswith(("json/", "email/", "asyncio/", "logging/", "http/")):
            taken.append(document)
    return build_corpus(taken, 40_000)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus, path)
    texts = [document.text for document in corpus.train]
    (path / "tokenizer.model").write_bytes(train_tokenizer(texts, VOCAB))
    tokenizer = load_tokenizer(path / "tokenizer.model")
    for split in ("train", "heldout"):
        write_indexed(read_texts(path / f"{split}.jsonl"), tokenizer, path / split)
    return path


def test_training_again_gives_the_same_bytes(corpus, folder):
    texts = [document.text for document in corpus.train]
    again = train_tokenizer(texts, VOCAB)
    assert again == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_round_trips_and_holds_no_control_token(folder, text):
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, EOD_ID, 3}


def test_vocabulary_has_the_size_asked_for_and_indentation_is_one_piece(folder):
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    assert tokenizer.get_piece_size() == VOCAB
    assert len(tokenizer.encode("\n        ")) == 2


def test_a_text_of_few_words_gives_as_many_pieces_as_it_can(tmp_path):
    (tmp_path / "small.model").write_bytes(train_tokenizer(["only a few words here"] * 10, 4096))
    tokenizer = load_tokenizer(tmp_path / "small.model")
    assert 261 < tokenizer.get_piece_size() < 400
    assert tokenizer.decode(tokenizer.encode("a few words")) == "a few words"


def test_indexed_files_hold_each_document_with_its_eod(corpus, folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(folder / "tokenizer.model")
    dataset = IndexedDataset(str(folder / "train"))
    assert len(dataset) == len(corpus.train)
    for row in random.Random(0).sample(range(len(dataset)), 5):
        ids = dataset[row].tolist()
        assert ids[-1] == tokenizer.eos_id() == EOD_ID
        assert tokenizer.decode(ids[:-1]) == corpus.train[row].text
    assert not list(folder.glob("*.partial"))


def test_bytes_do_not_depend_on_the_threads(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    seen: list[int] = []
    write_indexed(read_texts(folder / "train.jsonl"), tokenizer, tmp_path / "train", 1, seen.append)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"train{suffix}").read_bytes() == (
            folder / f"train{suffix}"
        ).read_bytes()
    assert seen == sorted(seen) and len(seen) > 1


def test_upstream_tokenizer_gives_the_same_tokens(folder):
    assert_equal_to_upstream_tokenizer(folder)


@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)
def test_stock_preprocess_data_writes_the_same_bytes(folder, tmp_path):
    tool = Path(os.environ["MEGATRON_LM_PATH"]) / "tools" / "preprocess_data.py"
    command = [sys.executable, "-m", "megatron_k2", str(tool)]
    command += ["--input", str(folder / "train.jsonl"), "--output-prefix", str(tmp_path / "stock")]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--append-eod", "--workers", "1"]
    command += ["--tokenizer-model", str(folder / "tokenizer.model")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for suffix in (".bin", ".idx"):
        stock = tmp_path / f"stock_text_document{suffix}"
        assert stock.read_bytes() == (folder / f"train{suffix}").read_bytes()


def assert_equal_to_upstream_tokenizer(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder / "tokenizer.model"), metadata_path={"library": "sentencepiece"}
    )
    dataset = IndexedDataset(str(folder / "train"))
    for row, text in enumerate(read_texts(folder / "train.jsonl")):
        assert dataset[row].tolist() == [*tokenizer.tokenize(text), tokenizer.eod]


def test_windows_are_shuffled_pieces_of_the_documents_that_overlap_by_one(folder, tmp_path):
    model = folder / "tokenizer.model"
    windows = read_windows(folder / "heldout", model, 64, 1234, tmp_path, None)
    again = read_windows(folder / "heldout", model, 64, 1234, tmp_path, 5)
    assert windows.shape[1] == 65
    assert (again == windows[:5]).all()
    starts = {tuple(row[:1]) for row in windows.tolist()}
    assert sum((row[-1],) in starts for row in windows.tolist()) >= len(windows) - 1
