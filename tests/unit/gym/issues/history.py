"""A tiny repository with a history: an issue, its fix and tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CALC = '''"""Sums and shares."""


def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result


def share(part, whole):
    return part / whole
'''
FIXED = CALC.replace("    return part / whole", "    return part / whole if whole else 0.0")
TEST = """import unittest

from pack.calc import share, total


class Calc(unittest.TestCase):
    def test_total(self):
        self.assertEqual(total([1, 2]), 3)

    def test_share(self):
        self.assertEqual(share(1, 2), 0.5)
"""
MORE = """
    def test_share_of_nothing(self):
        self.assertEqual(share(0, 0), 0.0)
"""
ISSUE = (
    "share fails for an empty whole\n\n`share(0, 0)` raises ZeroDivisionError; it should be 0.0."
)


def git(folder: Path, *arguments: str) -> str:
    environ = os.environ | {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "a"), ("EMAIL", "a@b"), ("DATE", "2026-01-01T00:00:00Z"))
    }
    argv = ["git", "-C", str(folder), "-c", "init.defaultBranch=main", *arguments]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(folder: Path, files: dict[str, str], message: str) -> str:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD")


def make(folder: Path) -> str:
    """Make the repository; return the commit that is the base of the fix."""
    folder.mkdir()
    git(folder, "init", "-q")
    first = {"pack/__init__.py": "", "pack/calc.py": CALC, "tests/test_calc.py": TEST}
    base = write(folder, first | {"README": "A calculator.\n", "pack/words.py": "A = 1\n"}, "Begin")
    git(folder, "checkout", "-q", "-b", "fix")
    write(folder, {"pack/calc.py": FIXED, "tests/test_calc.py": TEST + MORE}, "Mend share")
    git(folder, "checkout", "-q", "main")
    git(folder, "merge", "-q", "--no-ff", "fix", "-m", f"Merge pull request #1\n\n{ISSUE}")
    git(folder, "checkout", "-q", "-b", "docs")
    write(folder, {"README": "A better calculator.\n"}, "Words")
    git(folder, "checkout", "-q", "main")
    git(folder, "merge", "-q", "--no-ff", "docs", "-m", "Merge pull request #2\n\nWords")
    return base
