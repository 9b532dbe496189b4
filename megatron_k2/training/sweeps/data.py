"""The text of a sweep: one training set, and one held-out set a domain with its bytes counted.

A domain is a corpus under a name (a JSONL or text file, or one of the three that every Python
brings: its library, its tests, its reference). Part of each is held out by document, duplicates
are dropped within a domain, and a training document of any domain that repeats held-out text too.
One tokenizer is learnt from all training text. Everything is described by `data.json`, which may
also be written by hand over `.bin/.idx` files made elsewhere. Bytes are of the text, so that losses
in bits a byte compare across tokenizers; Megatron evaluates whole windows only, and the loss of the
last part of a set, shorter than a window, is taken to be the mean of the rest.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.data.corpus import MAX_OVERLAP, build_corpus, content_hash
from megatron_k2.data.documents import Document, read_input, read_python_library
from megatron_k2.data.near_duplicates import ShingleIndex, sketch
from megatron_k2.data.ngram import bits_per_byte
from megatron_k2.data.tokenize import load_tokenizer, train_tokenizer, write_indexed
from megatron_k2.training import stages

DESCRIPTION = "data.json"
MAX_DOMAIN_BYTES = 200_000_000  # read of a file at most, as in the main job
PYTHON_DOMAIN_BYTES = 6_000_000  # of a Python domain at most: more than a sweep here can read
PIECE_CHARS = 4_000  # long prose is cut at blank lines into documents of this size
TOPICS = "pydoc_data/topics.py"  # the language reference, as documents.py reads it


@dataclass(frozen=True)
class SweepData:
    """What the runs read. Paths are absolute; `domains` maps a name to tokens, bytes, prefix."""

    train: tuple[str, ...]
    tokenizer_flags: tuple[str, ...]
    domains: Mapping[str, Mapping[str, Any]]
    digest: str

    def flags(self) -> list[str]:
        """Return the flags that name the text and its tokenizer."""
        names = list(self.domains)
        return [
            *self.tokenizer_flags,
            *("--train-data-path", *self.train),
            *("--valid-data-path", *(self.domains[name]["prefix"] for name in names)),
            *("--full-validation", "--multiple-validation-sets"),
            *("--validation-set-names", *names),
        ]

    def bits_per_byte(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Convert held-out losses in nats a token, by domain; "all" is over all bytes.

        Args:
            losses: domain -> mean nats a token.
        """
        bits = {
            name: bits_per_byte(losses[name], domain["tokens"], domain["bytes"])
            for name, domain in self.domains.items()
        }
        num_bytes = sum(domain["bytes"] for domain in self.domains.values())
        total = sum(bits[name] * domain["bytes"] for name, domain in self.domains.items())
        return {**bits, "all": total / num_bytes}


def load_data(path: Path) -> SweepData:
    """Read a description of tokenised text.

    Args:
        path: a `data.json`; relative paths in it are relative to its folder.

    Raises:
        ValueError: the file is missing, damaged or lacks something.
    """
    record = stages.read_json(path)
    if record is None:
        raise ValueError(f"--data {path}: no such file")
    folder = path.parent
    try:
        domains = {
            name: {
                "prefix": _resolved(folder, domain["prefix"]),
                "tokens": int(domain["tokens"]),
                "bytes": int(domain["bytes"]),
            }
            for name, domain in record["domains"].items()
        }
        train = tuple(_resolved(folder, item) for item in record["train"])
        tokenizer = tuple(_resolved(folder, flag) for flag in record["tokenizer_flags"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--data {path}: {error!r}; wanted "
            '{"train": [prefix, ...], "tokenizer_flags": [flag, ...], '
            '"domains": {name: {"prefix": .., "tokens": .., "bytes": ..}}}'
        ) from error
    if not domains:
        raise ValueError(f"--data {path}: names no held-out domain")
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return SweepData(train, tokenizer, domains, digest)


def _resolved(folder: Path, item: str) -> str:
    """Return a file's or a `.bin/.idx` prefix's absolute path; anything else as it is."""
    path = folder / item
    is_there = path.is_file() or path.with_name(path.name + ".idx").is_file()
    return str(path.resolve()) if is_there else item


def prepare_data(
    folder: Path, sources: Mapping[str, Path], vocab_size: int, heldout_bytes: int
) -> SweepData:
    """Build the text of a sweep once; a second call reads it.

    Args:
        folder: of the finished stage.
        sources: domain -> file; empty takes the three Python domains.
        vocab_size: pieces of the tokenizer.
        heldout_bytes: wanted of each domain; never more than 10 % of it.

    Raises:
        ValueError: a file cannot be used, or the folder holds other text.
    """
    inputs = {
        "--domain": {n: stages.fingerprint(p, MAX_DOMAIN_BYTES) for n, p in _checked(sources)}
        or f"Python {sys.version.split()[0]}",
        "--vocab-size": vocab_size,
        "--heldout-bytes": heldout_bytes,
    }

    def build(partial: Path) -> dict[str, Any]:
        given = {name: _read_domain(path) for name, path in sources.items()}
        domains: Mapping[str, Iterable[Document]] = given or python_domains()
        return _build(partial, domains, vocab_size, heldout_bytes)

    stages.run_stage(folder, inputs, build)
    return load_data(folder / DESCRIPTION)


def _checked(sources: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    for name, path in sources.items():
        next(_read_domain(path), None)  # raises what is wrong with the file
        yield name, path


def _read_domain(path: Path) -> Iterator[Document]:
    try:
        yield from read_input(path, MAX_DOMAIN_BYTES)
    except ValueError as error:
        raise ValueError(str(error).replace("--input", "--domain", 1)) from error


def python_domains() -> dict[str, Iterable[Document]]:
    """Return the domains that come with Python: its library, its tests, its reference."""
    library, prose = [], []
    for document in read_python_library():
        if document.name == TOPICS or not document.name.endswith(".py"):
            prose += pieces(document)
        else:
            library.append(document)
    tests = Path(sysconfig.get_paths()["stdlib"], "test")
    suite = [
        Document(path.relative_to(tests).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(tests.glob("test_*.py"))
        if _is_utf8(path)
    ]
    domains = {"library": library, "tests": suite, "reference": prose}
    return {name: _first_bytes(found, PYTHON_DOMAIN_BYTES) for name, found in domains.items()}


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # the tests of encodings are in others
        return False
    return True


def _first_bytes(documents: list[Document], max_bytes: int) -> list[Document]:
    """Return documents in the order of their hash until they reach a size."""
    kept, size = [], 0
    for document in sorted(documents, key=lambda document: content_hash(document.text)):
        size += len(document.text.encode())
        if size > max_bytes:
            break
        kept.append(document)
    return kept


def pieces(document: Document) -> list[Document]:
    """Cut a long document at blank lines, so that a part of it can be held out."""
    found: list[Document] = []
    piece = ""
    for paragraph in document.text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= PIECE_CHARS:
            found.append(Document(f"{document.name}:{len(found)}", piece))
            piece = ""
    return [*found, Document(f"{document.name}:{len(found)}", piece)] if piece.strip() else found


def _build(
    folder: Path, domains: Mapping[str, Iterable[Document]], vocab_size: int, heldout_bytes: int
) -> dict[str, Any]:
    """Split, tokenise and write everything into an empty folder; return the description."""
    heldout: dict[str, list[Document]] = {}
    train: list[Document] = []
    index = ShingleIndex()
    for name, documents in domains.items():
        try:
            corpus = build_corpus(documents, heldout_bytes)
        except ValueError as error:
            raise ValueError(f"--domain {name}: {str(error).removeprefix('--input: ')}") from error
        heldout[name] = corpus.heldout
        train += corpus.train
        for document in corpus.heldout:
            index.add(sketch(document.text))
    distinct = {content_hash(document.text): document for document in train}
    # In the order of their hash, which mixes the domains: the tokenizer learns from the first part.
    texts = [
        distinct[key].text
        for key in sorted(distinct)
        if index.overlap(sketch(distinct[key].text)) <= MAX_OVERLAP
    ]
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(texts, vocab_size))
    tokenizer = load_tokenizer(model)
    described: dict[str, Any] = {
        "train": ["train"],
        "train_tokens": write_indexed(texts, tokenizer, folder / "train"),
        "train_bytes": sum(len(text.encode()) for text in texts),
        "tokenizer_flags": [
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model.name),
            *("--vocab-size", str(tokenizer.get_piece_size())),
        ],
        "domains": {},
    }
    for name, documents in heldout.items():
        prefix = folder / f"heldout-{name}"
        described["domains"][name] = {
            "prefix": prefix.name,
            "tokens": write_indexed([d.text for d in documents], tokenizer, prefix),
            "bytes": sum(len(document.text.encode()) for document in documents),
        }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
    return described
