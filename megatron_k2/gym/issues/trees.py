"""A repository's files at a commit: read from git, kept in an archive beside the tasks.

Text files alone, and those of at most ``MAX_FILE_BYTES``: what is left out is missing in the
sandbox too, and a task whose tests need it is dropped because they fail before and after.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

MAX_FILE_BYTES = 1 << 20
MAX_TREE_BYTES = 64 << 20
TEST_PATTERNS = ("test/*", "tests/*", "*/test/*", "*/tests/*", "test_*.py", "*/test_*.py")
MORE_TEST_PATTERNS = ("*_test.py", "conftest.py", "*/conftest.py")


def git(repository: Path, *arguments: str) -> bytes:
    """Run a command of git; return its output.

    Raises:
        ValueError: it failed; with its words.
    """
    argv = ["git", "-C", str(repository), *arguments]
    done = subprocess.run(argv, capture_output=True, check=False)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"git {' '.join(arguments[:2])} in {repository}: {words}")
    return done.stdout


def tree_of(repository: Path, commit: str) -> dict[str, str]:
    """Return path -> text of a commit.

    Raises:
        ValueError: no such commit, or more than ``MAX_TREE_BYTES``.
    """
    names, total = [], 0
    for line in git(repository, "ls-tree", "-r", "-l", "-z", commit).decode().split("\0"):
        if line:
            about, _, path = line.partition("\t")
            mode, kind, name, length = about.split()
            if kind == "blob" and mode in ("100644", "100755") and int(length) <= MAX_FILE_BYTES:
                names.append((path, name, int(length)))
                total += int(length)
    if total > MAX_TREE_BYTES:
        raise ValueError(f"{commit} of {repository} has {total} bytes; at most {MAX_TREE_BYTES}")
    order = "".join(f"{name}\n" for _, name, _ in names).encode()
    argv = ["git", "-C", str(repository), "cat-file", "--batch"]
    data = subprocess.run(argv, input=order, capture_output=True, check=True).stdout
    files, at = {}, 0
    for path, _, size in names:
        at = data.index(b"\n", at) + 1
        with contextlib.suppress(UnicodeDecodeError):
            files[path] = data[at : at + size].decode()
        at += size + 1
    return files


def is_test(path: str) -> bool:
    """Return whether a path is of tests, by the usual names."""
    patterns = (*TEST_PATTERNS, *MORE_TEST_PATTERNS)
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def save(files: Mapping[str, str], folder: Path) -> str:
    """Keep a tree in a folder, under its hash; return its name there."""
    text = json.dumps(dict(sorted(files.items())), ensure_ascii=False).encode()
    name = f"{hashlib.sha256(text).hexdigest()[:16]}.json.gz"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        part = folder / f"{name}.part"
        part.write_bytes(gzip.compress(text, mtime=0))
        part.replace(folder / name)
    return name


@lru_cache(maxsize=8)
def load(path: Path) -> dict[str, str]:
    """Return the tree of an archive.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        found: dict[str, str] = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: no tree of a repository ({error})") from error
    return found
