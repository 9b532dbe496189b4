"""``python -m megatron_k2.life.corpus``: the texts that the small model reads, in parts of a blend.

PROSE and CODE are Python's standard library, LONG its long files, TOOLS declarations of tools as
they stand in API documents, PEOPLE invented people, whom the next stages rephrase. Without
duplicates, split by content hash; no part holds a held-out document. ``vocabulary.jsonl`` is what
the tokenizer is learnt from: the same texts without their digits, which therefore stay tokens of
their own, and phrases that dialogues repeat.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.data.corpus import Corpus, build_corpus
from megatron_k2.data.documents import Document, read_python_library
from megatron_k2.data.facts_corpus.people import World
from megatron_k2.data.facts_corpus.wordings import source_document
from megatron_k2.rl.critic.spelled import QUESTION
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.recipes.text import PARTS
from megatron_k2.training.stages import write_json

HELDOUT_BYTES = 400_000  # of which the long files are kept as well: 150,000 tokens here
HELDOUT_SHORT_BYTES = (
    60_000  # of the held-out text that the loss is measured on, about 25,000 tokens
)
SAMPLE_BYTES = 2_000_000  # of the library, for the vocabulary: its merges settle far below this
PHRASES = (
    *("system", "user", "assistant", "K2", QUESTION.format(word="")),
    *(f'{{"verdicts": ["{one}"]}}' for one in "AB"),
)
PHRASE_REPEATS = 100  # so that each becomes a few tokens: questions then cost little
REPEATS = 3  # of tools in that sample: they are little beside the library and fill whole contexts


def tool_documents(path: Path) -> list[str]:
    """Return declarations as documents, one a server: what its tools are called and take.

    Args:
        path: ``tools.jsonl`` of ``synthesize_agentic.py run --stages tools``.

    Raises:
        ValueError: no such file, or it holds no tools.
    """
    try:
        tools = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"--tools {path}: {error.strerror}") from error
    servers: dict[str, list[dict[str, Any]]] = {}
    for tool in tools:
        function = {key: tool[key] for key in ("name", "description", "parameters")}
        declared = {"type": "function", "function": function}
        servers.setdefault(tool["server"], []).append(declared)
    if not servers:
        raise ValueError(f"--tools {path}: no tool in it")
    return [_json(declared) for declared in servers.values()]


def people_documents(seed: int, count: int) -> list[str]:
    """Return a document for each of so many invented people, in the wording of sources."""
    return [source_document(person) for person in World(seed).people("life", count)]


def vocabulary_texts(
    library: Iterable[Document], tools: Sequence[str], people: Sequence[str]
) -> list[str]:
    """Return what a tokenizer is learnt from; digits are blanks, so that no merge holds one."""
    texts, size = [], 0
    for document in library:
        if size < SAMPLE_BYTES:
            texts.append(document.text)
            size += len(document.text.encode())
    known = [*tools, *PHRASES * PHRASE_REPEATS] * REPEATS
    return [re.sub(r"\d", " ", text) for text in (*texts, *known, *people)]


def write_parts(corpus: Corpus, others: dict[str, list[str]], out: Path) -> dict[str, int]:
    """Write every part as JSONL of ``{"text": ...}``; return the characters of each."""
    texts = {
        name: [one.text for one in corpus.train if keep(one)] for name, keep in PARTS.items()
    } | others
    texts["long_heldout"] = [one.text for one in corpus.heldout if PARTS["long"](one)]
    texts["heldout"] = _first([one.text for one in corpus.heldout], HELDOUT_SHORT_BYTES)
    for name, documents in texts.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
        publish_text(out / f"{name}.jsonl", "\n".join(lines) + "\n")
    return {name: sum(map(len, documents)) for name, documents in texts.items()}


def write(args: argparse.Namespace) -> None:
    """Write the parts, the tokenizer's text and ``corpus.json``, which says what they hold.

    Raises:
        ValueError: a file of tools that cannot be read.
    """
    tools, people = tool_documents(args.tools), people_documents(args.seed, args.people)
    corpus = build_corpus(read_python_library(), HELDOUT_BYTES)
    args.output.mkdir(parents=True, exist_ok=True)
    # Spread over the library, whose files are in order of their names.
    spread = sorted(corpus.train, key=lambda one: hash_key(one.name))
    vocabulary = vocabulary_texts(spread, tools, people)
    chars = write_parts(
        corpus, {"tools": tools, "people": people, "vocabulary": vocabulary}, args.output
    )
    report = corpus.report
    duplicates = report.num_exact_duplicates + report.num_near_duplicates
    train = sum(chars[name] for name in ("prose", "code", "tools", "people"))
    figures = {"duplicates": duplicates, "train_megabytes": round(train / 1e6, 3), "chars": chars}
    write_json(args.output / "corpus.json", {**figures, "sample": people[0]})
    print(f"[corpus] {train:,} characters to train on, {duplicates} duplicates dropped")
    print(f"[corpus] {', '.join(f'{name} {size:,}' for name, size in chars.items())}")


def hash_key(name: str) -> str:
    """Return what orders documents as if at random, the same on every machine."""
    from megatron_k2.data.corpus import content_hash

    return content_hash(name)


def _first(texts: Sequence[str], num_bytes: int) -> list[str]:
    """Return the first texts, up to and with the one that reaches a size."""
    found: list[str] = []
    while len(found) < len(texts) and sum(len(text.encode()) for text in found) < num_bytes:
        found.append(texts[len(found)])
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser("python -m megatron_k2.life.corpus", description=__doc__)
    add = made.add_argument
    add("--output", type=Path, required=True, metavar="DIR")
    add("--tools", type=Path, required=True, metavar="JSONL", help="of a run of agentic synthesis")
    add("--people", type=int, default=64, help="invented people; default 64")
    add("--seed", type=int, default=1, help="of the people")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
