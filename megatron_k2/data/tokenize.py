"""A sentencepiece tokenizer from text, and text to Megatron's `.bin/.idx`.

The tokenizer is byte-pair encoding with byte fallback (every UTF-8 text round-trips, except that
a literal U+2581 becomes a space), identity normalisation and white space kept: indentation is
pieces of its own and a line feed one piece, as source code needs. Control pieces are never
matched in text, so a document that contains "</s>" cannot end itself. It is a stock
`--tokenizer-type SentencePieceTokenizer` model: the bytes written here are those of stock
`tools/preprocess_data.py --append-eod`.

The main job's way, in one go; ``preprocess`` is the one for corpora: Kimi's tokenizer, resume,
provenance, any number of workers.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

EOD_ID = 2  # "</s>": what upstream's SentencePieceTokenizer returns as eod
SAMPLE_BYTES = 4_000_000  # of text to learn from: 1 s of one core, and more changes little
LINE_CHARS = 2_000  # sentencepiece learns from lines; longer ones are cut here
BATCH_DOCUMENTS = 32  # encoded at once by `num_threads` threads


def read_texts(jsonl: Path) -> Iterator[str]:
    """Yield the "text" of each line of a JSONL file."""
    with jsonl.open("rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> bytes:
    """Learn a tokenizer.

    Args:
        texts: training documents only; the first ``sample_bytes`` are learnt from, so give them
            shuffled.
        vocab_size: number of pieces, with 4 control, 1 line feed and 256 byte pieces in it. Texts
            of too few distinct words give as many as they can.
        sample_bytes: of text, in characters.

    Returns:
        The serialised sentencepiece model, byte-identical for the same texts.
    """
    sample = list(_sample_lines(texts, sample_bytes))
    try:
        return _train(sample, vocab_size)
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if most is None:
            raise
        return _train(sample, int(most[1]))


def _train(lines: list[str], vocab_size: int) -> bytes:
    """Return the model that sentencepiece learns from the lines."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,  # sentencepiece's default; the rest goes to bytes
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=EOD_ID,
        pad_id=3,
        max_sentence_length=8 * LINE_CHARS,  # bytes; 4 a character at most
        num_threads=1,  # it is stored in the model, whose bytes must not vary
        minloglevel=2,  # errors only
    )
    return model.getvalue()


def _sample_lines(texts: Iterable[str], remaining: int) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS]
        remaining -= len(text)
        if remaining <= 0:
            return


def load_tokenizer(model: Path) -> Any:
    """Return the sentencepiece processor of a model file.

    Raises:
        ValueError: the file is missing or not a sentencepiece model.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--tokenizer-model {model}: not a sentencepiece model") from error


def write_indexed(
    texts: Iterable[str],
    tokenizer: Any,
    prefix: Path,
    num_threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Encode documents and write `prefix.bin` and `prefix.idx` with upstream's builder.

    Each document is one sequence that ends in EOD; documents without tokens are left out, as
    upstream does. Both files appear at once or not at all (temporary names, then rename; the
    index last). The bytes do not depend on `num_threads`.

    Args:
        texts: documents, in the order in which they are written.
        tokenizer: what `load_tokenizer` returned.
        prefix: path without suffix, in an existing folder.
        num_threads: encoder threads.
        progress: called with the number of characters encoded so far.

    Returns:
        Number of tokens written, EODs included.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    partial_bin = prefix.with_name(prefix.name + ".bin.partial")
    partial_idx = prefix.with_name(prefix.name + ".idx.partial")
    builder = IndexedDatasetBuilder(
        str(partial_bin), dtype=DType.optimal_dtype(tokenizer.get_piece_size())
    )
    num_tokens = num_chars = 0
    for batch in batched(texts, BATCH_DOCUMENTS):
        for ids in tokenizer.encode(list(batch), num_threads=num_threads):
            if ids:
                builder.add_document([*ids, tokenizer.eos_id()], [len(ids) + 1])
                num_tokens += len(ids) + 1
        num_chars += sum(map(len, batch))
        if progress is not None:
            progress(num_chars)
    builder.finalize(str(partial_idx))
    for partial, suffix in ((partial_bin, ".bin"), (partial_idx, ".idx")):
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(prefix.with_name(prefix.name + suffix))
    return num_tokens
