"""Small corpora for the tests of tools/preprocess_data.py, and stock Megatron's way with them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_k2.data.preprocess.command import preprocess
from tests.unit.chat.kimi_files import write_tokenizer

HARD_TEXTS = [
    "The first document, with <|im_end|> and [EOS] as text; <|im_end|> again.\n",
    "",
    "def encode(self, text):\n\treturn 1234567\n" * 40,
    "你好世界 café 😀 日本語のテキスト",
    " \n\t \r\n",
    "a\0b <|reserved_token_441|> [PAD",
    "9" * 50,
]
WORDS = ["the", "weather", "city", "don't", "HTTPRequest", "12345", "return;", "你好", "(x)\n"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Return hard texts and random ones."""
    generator = random.Random(seed)
    more = [" ".join(generator.choices(WORDS, k=generator.randrange(120))) for _ in range(count)]
    return [*HARD_TEXTS, *more]


def jsonl(path: Path, values: Sequence[Any]) -> Path:
    """Write one object a line, packed by the suffix."""
    data = "".join(json.dumps({"text": value, "n": n}) + "\n" for n, value in enumerate(values))
    return packed(path, data.encode())


def packed(path: Path, data: bytes) -> Path:
    """Write bytes; .gz in two members, .zst in two frames."""
    middle = len(data) // 2
    if path.suffix == ".gz":
        data = gzip.compress(data[:middle]) + gzip.compress(data[middle:])
    elif path.suffix == ".zst":
        import zstandard

        compress = zstandard.ZstdCompressor().compress
        data = compress(data[:middle]) + compress(data[middle:])
    path.write_bytes(data)
    return path


def kimi_flags(folder: Path) -> list[str]:
    """Write a stand-in of Kimi's tokenizer; return the flags."""
    write_tokenizer(folder)
    return ["--tokenizer-type", "KimiTiktokenTokenizer", "--tokenizer-model", str(folder)]


def tokenise(prefix: Path, inputs: Sequence[Path | str], *flags: str, workers: int = 1) -> Path:
    """Run the tool in this process."""
    given = ["--input", *map(str, inputs), "--output-prefix", str(prefix)]
    preprocess([*given, "--workers", str(workers), *flags])
    return prefix


def contents(prefix: Path) -> dict[str, bytes]:
    """Return the bytes of all files of an output, by what follows the prefix."""
    found = sorted(prefix.parent.glob(prefix.name + "[._]*"))
    assert not any(path.is_dir() for path in found), found
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in found}


def write_stock(
    prefix: Path, documents: Sequence[str | list[str]], tokenizer: Any, append_eod: bool = True
) -> None:
    """Write documents by upstream's classes, as its tools/preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        ids: list[int] = []
        lengths = []
        for sentence in [document] if isinstance(document, str) else document:
            if found := tokenizer.tokenize(sentence):
                ids.extend(found)
                lengths.append(len(found))
        if ids and append_eod:
            ids.append(tokenizer.eod)
            lengths[-1] += 1
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")
