"""The text of a scaled-down recipe: Python's standard library in the parts that a recipe blends.

PROSE is its documentation, CODE its modules, LONG those files of both that are long beside any
sequence of a small model, LONG_HELDOUT long files that no stage reads. Without duplicates, split
by content hash (data/corpus.py); the tokenizer is learnt from the training text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_k2.data.corpus import build_corpus
from megatron_k2.data.documents import Document, read_python_library
from megatron_k2.data.tokenize import load_tokenizer, train_tokenizer, write_indexed
from megatron_k2.training import stages

PYTHON_LIBRARY = "python-library"  # the one value of a recipe's `text`
LONG_CHARS = 16_000  # about 8,000 tokens of k2-micro's vocabulary, 8 of its long sequences
HELDOUT_BYTES = 400_000  # of which the long files are kept: about 100,000 tokens
PARTS: dict[str, Callable[[Document], bool]] = {
    "prose": lambda one: not one.name.endswith(".py") or one.name == "pydoc_data/topics.py",
    "code": lambda one: one.name.endswith(".py") and one.name != "pydoc_data/topics.py",
    "long": lambda one: len(one.text) >= LONG_CHARS,
}


def prepare(folder: Path, vocab_size: int) -> dict[str, str]:
    """Write tokenizer and `.bin/.idx` pairs, once; return the variables that name them.

    Args:
        folder: of the finished files.
        vocab_size: pieces of the tokenizer.

    Raises:
        ValueError: the folder was made for another vocabulary.
    """

    def build(target: Path) -> dict[str, Any]:
        corpus = build_corpus(read_python_library(), HELDOUT_BYTES)
        model = target / "tokenizer.model"
        model.write_bytes(train_tokenizer((one.text for one in corpus.train), vocab_size))
        tokenizer = load_tokenizer(model)
        threads = min(2, len(os.sched_getaffinity(0)))
        chosen = {name: list(filter(keep, corpus.train)) for name, keep in PARTS.items()}
        chosen["long_heldout"] = list(filter(PARTS["long"], corpus.heldout))
        return {
            name: write_indexed((one.text for one in some), tokenizer, target / name, threads)
            for name, some in chosen.items()
        }

    report, built = stages.run_stage(folder, {"vocabulary": vocab_size}, build)
    counts = ", ".join(f"{name} {count:,}" for name, count in report.items())
    print(f"[text] tokens: {counts}" + ("" if built else "; done before"), flush=True)
    variables = {name.upper(): str(folder / name) for name in report}
    return {**variables, "TOKENIZER": str(folder / "tokenizer.model")}
