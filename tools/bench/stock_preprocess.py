"""A stand-in for Megatron's tools/preprocess_data.py, which the wheel does not have.

The wheel's own tokenizers, argument parser and ``IndexedDatasetBuilder``, joined as that script
joins them: lines of the file through ``Pool.imap`` in chunks of 32, one document each, one writer.
Used by tokenization.py where ``MEGATRON_LM_PATH`` names no checkout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from typing import Any

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import _add_tokenizer_args

tokenizer: Any = None
CHUNK_LINES = 32


def initialise(args: argparse.Namespace) -> None:
    """Load the tokenizer of one worker."""
    global tokenizer
    tokenizer = build_tokenizer(args)


def encode(line: str) -> list[int]:
    """Return the ids of one line's document, with EOD."""
    ids = tokenizer.tokenize(json.loads(line)["text"])
    return [*ids, tokenizer.eod] if ids else []


def main() -> None:
    """Tokenise one JSONL file."""
    parser = _add_tokenizer_args(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--input", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--append-eod", action="store_true", required=True)
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args()
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
    prefix = f"{args.output_prefix}_text_document"
    vocab_size = build_tokenizer(args).vocab_size
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    with (
        open(args.input, encoding="utf-8") as lines,
        multiprocessing.Pool(args.workers, initializer=initialise, initargs=(args,)) as pool,
    ):
        for ids in pool.imap(encode, lines, CHUNK_LINES):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main()
