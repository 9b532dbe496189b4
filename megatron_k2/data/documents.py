"""Sources of documents: the Python standard library, one's own JSONL or plain text.

The standard library is the one corpus that every machine with Python has: its modules, the text
files beside them and the language reference that `help()` prints (pydoc_data). Left out are
site-packages, test data, bundled wheels and the code-page tables of `encodings`, which are
numbers rather than text.

Every fault of the user's file is a ValueError of one line that names the file and the line.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
LIBRARY_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
    | {"lib-dynload", "ensurepip"}
)
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PLAIN_DOCUMENT_CHARS = 4_000  # a plain text file is cut at blank lines into pieces of this size


@dataclass(frozen=True)
class Document:
    """One text. `name` is relative to its source, so it is the same on every machine."""

    name: str
    text: str


def read_python_library(root: Path | None = None) -> Iterator[Document]:
    """Yield the standard library's sources and documentation, in order of name.

    Args:
        root: folder to read; the running interpreter's standard library when None.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        skipped = any(part in LIBRARY_SKIPPED for part in relative.parts[:-1])
        if skipped or path.suffix not in LIBRARY_SUFFIXES or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # lib2to3 and idlelib ship a few files in other encodings
            continue
        if relative.as_posix() == "pydoc_data/topics.py":
            text = _python_topics(text)
        yield Document(relative.as_posix(), text)


def read_input(path: Path, max_bytes: int) -> Iterator[Document]:
    """Yield the documents of a user's file until `max_bytes` of it were read.

    Args:
        path: JSONL whose objects have a "text" field (by suffix), or plain UTF-8 text.
        max_bytes: how much of the file to read at most.

    Raises:
        ValueError: no such file, a folder, unreadable, empty, not UTF-8, not JSON, no "text".
    """
    if not path.exists():
        raise ValueError(f"--input {path}: no such file")
    if not path.is_file():
        raise ValueError(f"--input {path}: not a file; give one JSONL or plain text file")
    try:
        empty = path.stat().st_size == 0
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror})") from error
    if empty:
        raise ValueError(f"--input {path}: the file is empty")
    if path.suffix.lower() in JSONL_SUFFIXES:
        yield from _read_jsonl(path, max_bytes)
    else:
        yield from _read_plain(path, max_bytes)


def _read_jsonl(path: Path, max_bytes: int) -> Iterator[Document]:
    read_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"--input {path}: line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 (byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'{where} is not JSON ({error.msg}); each line must be {{"text": "..."}}'
                ) from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{where} has no "text" field that holds a string')
            yield Document(f"line {number}", valid_unicode(record["text"]))
            read_bytes += len(line)
            if read_bytes >= max_bytes:
                return


def _read_plain(path: Path, max_bytes: int) -> Iterator[Document]:
    """Cut plain text at blank lines, so that a split by document is possible."""
    piece: list[str] = []
    piece_chars = read_bytes = number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"--input {path}: line {number} is not UTF-8 (byte {error.start})"
                ) from error
            piece.append(line)
            piece_chars += len(line)
            read_bytes += len(raw)
            if piece_chars >= PLAIN_DOCUMENT_CHARS and not line.strip():
                yield Document(f"text up to line {number}", "".join(piece))
                piece, piece_chars = [], 0
                if read_bytes >= max_bytes:
                    return
    if piece:
        yield Document(f"text up to line {number}", "".join(piece))


def valid_unicode(text: str) -> str:
    """Replace lone surrogates (legal in JSON, not in UTF-8) by U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _python_topics(source: str) -> str:
    """Return the prose of pydoc_data/topics.py, which is one big dictionary literal."""
    import ast

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node)
            return "\n\n".join(topics[name] for name in sorted(topics))
    return source
