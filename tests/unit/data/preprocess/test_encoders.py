"""Encoders: Kimi's ids exactly, Hugging Face's, sentencepiece's; no control token from text."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_k2.chat.tokenizer import MAX_RUN_CHARS, MAX_SLICE_CHARS, PATTERN, KimiTokenizer
from megatron_k2.data.documents import read_python_library
from megatron_k2.data.preprocess.control_text import ControlText
from megatron_k2.data.preprocess.encoders import build_encoder
from megatron_k2.data.preprocess.fast_engine import Checked
from tests.unit.chat.kimi_files import SAMPLE, write_tokenizer

KIMI = "KimiTiktokenTokenizer"
PIECES = [
    "the ", "The", "THE'S", "don't", "we'LL", " they're", "12", "1234567", "\t", "  ", "\n", "\r\n",
    "\n\n ", "你好", "世界", "日本語の", "한국어", "café", "e\u0301", "Ǆ", "ß", "İ", "ﬀ", "😀",
    "\u200d", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x1c", "def f(x):",
    "!!!", "...", "[EOS]", "<|im_end|>", "<|im_", "[PAD", "१२३", "Ⅷ", "ـ", "\u0301", "a" * 40,
    " " * 17, "x.y_z", "—“”", "/*", "\U0010ffff",
]  # fmt: skip


def fuzz(count: int, seed: int) -> list[str]:
    """Return random strings: pieces, single characters of all of Unicode, repetitions."""
    generator, found = random.Random(seed), []
    for _ in range(count):
        pieces = []
        for _ in range(generator.randrange(1, 24)):
            kind = generator.random()
            if kind < 0.7:
                piece = generator.choice(PIECES)
            elif kind < 0.9:
                piece = chr(generator.randrange(0x3000 if kind < 0.8 else 0x110000))
            else:
                piece = generator.choice(PIECES)[:3] * generator.randrange(2, 9)
            pieces.append(piece)
        # Lone surrogates never reach an encoder: records.py replaces them.
        found.append("".join(pieces).encode("utf-8", "replace").decode())
    return found


def long_texts(count: int, seed: int) -> list[str]:
    """Return texts that the release cuts: runs and lengths around both limits."""
    generator, found = random.Random(seed), []
    for number in range(count):
        run = MAX_RUN_CHARS + generator.choice([-1, 0, 1, 2, 7, MAX_RUN_CHARS, 40_000])
        unit = generator.choice([" ", "9", "你", "a", "!?", "\n", "\t ", "ab1"])
        text = generator.choice(PIECES) + (unit * run)[:run] + generator.choice(PIECES)
        if number % 4 == 0:
            words = " ".join(generator.choices(PIECES, k=200))
            length = MAX_SLICE_CHARS + generator.choice([-1, 0, 1, 77, 250_000])
            text = (words * (length // len(words) + 1))[: length - len(text)] + text
        found.append(text)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("kimi"))


def trained_ranks(folder: Path, vocab_size: int) -> Path:
    """Learn a larger stand-in of the same construction, from the standard library and CJK."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from megatron_k2.data.kimi_tokenizer import byte_characters

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    texts = [
        d.text for d in read_python_library() if d.name.startswith(("email", "asyncio", "pydoc"))
    ]
    tokenizer.train_from_iterator([*texts, *[SAMPLE] * 20, *fuzz(3000, 9)], trainer)
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    lines = sorted(
        (i, bytes(bytes_of[c] for c in token)) for token, i in tokenizer.get_vocab().items()
    )
    path = folder / "tiktoken.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in lines))
    return path


def assert_exact(model: Path, engine: str, texts: list[str]) -> None:
    encoder, reference = build_encoder(KIMI, str(model), engine), KimiTokenizer(model)
    for start in range(0, len(texts), 64):
        batch = texts[start : start + 64]
        ids, counts = encoder.encode(batch)
        stops = np.cumsum(counts)
        assert len(ids) == stops[-1]
        for text, stop, count in zip(batch, stops, counts, strict=True):
            assert ids[stop - count : stop].tolist() == reference.encode(text), text[:200]


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_kimis_ids_are_exact_on_2000_strings(folder, engine: str) -> None:
    if engine == "fast":
        pytest.importorskip("fastokens")
    count = 2000 if engine == "fast" else 200  # the reference itself: only what is around it
    assert_exact(folder, engine, [*fuzz(count, 0), "", *long_texts(count // 250, 0)])


@pytest.mark.evidence
def test_kimis_ids_are_exact_on_100000_strings(tmp_path) -> None:
    pytest.importorskip("fastokens")
    model = trained_ranks(tmp_path, 20_000)
    texts = [*fuzz(100_000, 1), *long_texts(200, 1)]
    assert sum(len(text) > MAX_SLICE_CHARS for text in texts) >= 20
    assert_exact(model, "fast", texts)


def test_a_difference_of_the_fast_engine_ends_the_run() -> None:
    def fast(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(3 * len(texts), dtype=np.uint32), np.full(len(texts), 3)

    checked = Checked(fast, lambda text: [0, 1, 2], "tiktoken")
    checked(["a"])
    with pytest.raises(RuntimeError, match=r"differ from token 1 on .*--engine reference"):
        Checked(fast, lambda text: [0, 7, 2], "tiktoken")(["a"])
    seen: list[str] = []
    counted = Checked(fast, lambda text: seen.append(text) or [0, 1, 2], "tiktoken")
    for start in range(0, 3000, 60):
        counted([str(number) for number in range(start, start + 60)])
    assert seen == ["0", "1024", "2048"]


def test_without_fastokens_auto_is_the_reference(folder, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert build_encoder(KIMI, str(folder)).encode(["the they"])[1].sum() > 0
    with pytest.raises(ValueError, match=r"--engine fast.*megatron-k2\[data\]"):
        build_encoder(KIMI, str(folder), "fast")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a template that adds BOS, and one control token that is not special."""
    import tokenizers
    from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 5, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("template", [True, False])
def test_hugging_face_ids_are_megatrons(hugging_face, engine: str, template: bool) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    stock: Any = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(hugging_face), metadata_path={"library": "huggingface"},
        include_special_tokens=template,
    )  # fmt: skip
    texts = [*fuzz(150, 3), "", "a    b"]
    for control_tokens in ("ids", "text"):
        encoder = build_encoder(
            "HuggingFaceTokenizer", str(hugging_face), engine, control_tokens, template
        )
        assert (encoder.vocab_size, encoder.eod) == (stock.vocab_size, stock.eod)
        for text in texts:
            assert encoder.encode([text])[0].tolist() == stock.tokenize(text)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_hugging_face_control_tokens_stay_text(hugging_face, engine: str) -> None:
    text = "</s> and <think> and <s>    "
    encoder = build_encoder("HuggingFaceTokenizer", str(hugging_face), engine)
    ids = encoder.encode([text])[0]
    names = {name: encoder.control_names[name] for name in ("</s>", "<think>", "<s>")}
    assert "    " not in encoder.control_names
    assert [token for token in ids.tolist() if token in names.values()] == [names["<s>"]]  # BOS
    asked = build_encoder("HuggingFaceTokenizer", str(hugging_face), engine, "ids")
    assert set(names.values()) <= set(asked.encode([text])[0].tolist())
    found: Counter[str] = Counter()
    ControlText(encoder.control_names).count([text, text], found)
    assert found == dict.fromkeys(names, 2)


def test_a_tokenizer_json_that_transformers_would_change_is_refused(hugging_face, tmp_path) -> None:
    data = (hugging_face / "tokenizer.json").read_text()
    config = json.loads((hugging_face / "tokenizer_config.json").read_text())
    changes = {
        "add_bos_token is False there": {"add_bos_token": False},
        "add_eos_token is True there": {"add_eos_token": True},
        "'<new>' of added_tokens_decoder": {"added_tokens_decoder": {"900": {"content": "<new>"}}},
    }
    for message, change in changes.items():
        (tmp_path / "tokenizer.json").write_text(data)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            build_encoder("HuggingFaceTokenizer", str(tmp_path))
    for text in ("{", "[]", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"--tokenizer-model .*not a tokenizer\.json"):
            build_encoder("HuggingFaceTokenizer", str(tmp_path))


def test_sentencepiece_symbols_stay_text(tmp_path) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    from megatron_k2.data.tokenize import train_tokenizer

    data = train_tokenizer([SAMPLE] * 3, 340)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    turn = len(proto.pieces) - 1
    symbol = proto.pieces[turn]
    symbol.piece, symbol.type = "<turn>", symbol.USER_DEFINED
    model = tmp_path / "spm.model"
    model.write_bytes(proto.SerializeToString())
    stock = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = "the <turn> they\n</s>"
    assert turn in stock.encode(text)
    encoder = build_encoder("SentencePieceTokenizer", str(model))
    assert turn not in encoder.encode([text])[0].tolist()
    assert encoder.control_names["<turn>"] == turn and "\n" not in encoder.control_names
    asked = build_encoder("SentencePieceTokenizer", str(model), control_tokens="ids")
    assert asked.encode([text])[0].tolist() == stock.encode(text)


def test_the_longest_of_overlapping_names_is_counted() -> None:
    found: Counter[str] = Counter()
    ControlText(["<|a|>", "<|a|>x", "[E]", "[EO]", " "]).count(
        ["<|a|>x<|a|><|b|>[EO][E", ""], found
    )
    assert found == {"<|a|>x": 1, "<|a|>": 1, "[EO]": 1}
