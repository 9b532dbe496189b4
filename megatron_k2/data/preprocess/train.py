"""A tokenizer from the input of ``tools/preprocess_data.py``: sentencepiece or a rank file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from megatron_k2.data.preprocess.claim import named_by
from megatron_k2.data.preprocess.optional import require
from megatron_k2.data.preprocess.records import BlockReader, Options, flat
from megatron_k2.data.preprocess.sources import Source
from megatron_k2.data.preprocess.train_ranks import train_ranks
from megatron_k2.data.tokenize import train_tokenizer

_SHRINKAGE = 4
"""Text packs to about a quarter; a wrong guess makes the sample less even, no more."""


TYPES = ("sentencepiece", "kimi")


def train(
    sources: Sequence[Source],
    options: Options,
    vocab_size: int,
    output: Path,
    sample_bytes: int,
    kind: str = "sentencepiece",
) -> None:
    """Learn a model and write it; the same input gives the same bytes.

    Args:
        sources: input files.
        options: how to read them; all keys are learnt from.
        vocab_size: number of pieces.
        output: the model file, which must not exist.
        sample_bytes: of text to learn from, documents chosen by their hash.
        kind: one of ``TYPES``.

    Raises:
        ValueError: the file exists or cannot be made, the input is bad or too little for the
            vocabulary.
    """
    if output.exists():
        raise ValueError(f"--output {output}: is there; remove it, or give another")
    with named_by(f"--output {output}"):  # before the work
        output.parent.mkdir(parents=True, exist_ok=True)
    packed = sum(s.num_bytes for s in sources if s.compression or s.format == "parquet")
    total = sum(s.num_bytes for s in sources) + (_SHRINKAGE - 1) * packed
    share = min(1.0, sample_bytes / max(1, total))
    texts = _texts(sources, options, share)
    if kind == "kimi":
        model = train_ranks(texts, vocab_size)
    else:
        model = _train_pieces(texts, vocab_size, sample_bytes)
    partial = output.with_name(output.name + ".partial")
    with named_by(f"--output {output}"):
        partial.write_bytes(model)
        os.replace(partial, output)
    print(f"wrote {output}")


def _train_pieces(texts: Iterator[str], vocab_size: int, sample_bytes: int) -> bytes:
    """Return a sentencepiece model of exactly so many pieces.

    Raises:
        ValueError: there is no text, or the vocabulary is too small or too large for it.
    """
    first = next((text for text in texts if text.strip("\n")), None)
    if first is None:
        raise ValueError("--input: no text to learn from")
    try:
        model = train_tokenizer(chain([first], texts), vocab_size, sample_bytes)
    except RuntimeError as error:
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if least is None:
            cause = re.sub(r"^\w+: \S+ (\[.*\] )?", "", str(error))
            raise ValueError(f"--input: sentencepiece does not learn from it ({cause})") from error
        raise ValueError(
            f"--vocab-size {vocab_size}: the text's characters alone need {int(least[1]):,} pieces "
            "(4 control, 1 line feed and 256 byte pieces among them)"
        ) from error
    sentencepiece = require("sentencepiece", "train-tokenizer")
    found = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    if found < vocab_size:
        raise ValueError(
            f"--vocab-size {vocab_size}: the text gives only {found:,}; give more, or ask for less"
        )
    return model


def _texts(sources: Sequence[Source], options: Options, share: float) -> Iterator[str]:
    """Yield the texts of a share of all documents."""
    reader = BlockReader(options)
    threshold = int(share * 2**64)
    for source in sources:
        reader.is_last = False
        block = 0
        while not reader.is_last:
            for batch in reader.read(source, block):
                for texts in batch.texts:
                    for text in flat(texts)[0]:
                        digest = blake2b(text.encode(), digest_size=8).digest()
                        if int.from_bytes(digest) < threshold:
                            yield text
            block += 1
    reader.close()
