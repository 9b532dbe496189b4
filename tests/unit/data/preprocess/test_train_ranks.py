"""A learnt rank file: a tokenizer of Kimi's construction, and nearly that of a slow trainer."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import pytest

from megatron_k2.chat.special_tokens import CONTROL_TOKENS
from megatron_k2.chat.tokenizer import KimiTokenizer
from megatron_k2.data.documents import read_python_library
from megatron_k2.data.preprocess.train_ranks import train_ranks
from tests.reference import kimi_tokenizer as slow


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = itertools.islice(read_python_library(), 40)
    return [document.text for document in documents if len(document.text) < 9000]


def test_learnt_ranks_read_as_kimis_and_give_back_every_text(
    texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tiktoken.model").write_bytes(train_ranks(iter(texts), 900))
    tokenizer = KimiTokenizer(tmp_path)
    assert tokenizer.vocab_size == 900
    assert tokenizer.special_tokens["<|im_end|>"] == 900 - 256 + CONTROL_TOKENS["<|im_end|>"]
    for text in [*texts, "早上好, naïve 12345 \r\n\t don't\0"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert sum(len(tokenizer.encode(text)) for text in texts) < sum(map(len, texts)) / 1.5
    assert train_ranks(iter(texts), 900) == (tmp_path / "tiktoken.model").read_bytes()


def test_merges_are_nearly_all_those_of_a_slow_trainer(texts: list[str]) -> None:
    """Pairs of equal count come in another order, and so may what is built on them."""
    lines = train_ranks(iter(texts[:4]), 512 + 150).splitlines()
    found = {base64.b64decode(line.split()[0]) for line in lines}
    wanted = slow.train("\n".join(texts[:4]), 150)
    assert len(found & set(wanted)) > 0.95 * len(wanted)


@pytest.mark.parametrize(
    ("size", "message"), [(511, "at least 512"), (5000, "the text gives only")]
)
def test_an_impossible_vocabulary_is_refused(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_ranks(iter(["a few words, and a few words more"]), size)
