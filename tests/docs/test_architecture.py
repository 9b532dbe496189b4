"""The walks of docs/architecture.md name what is there, and its table of functions is whole.

Read from the text of the sources: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
WALKS, _, TABLE = PAGE.partition("## The longest functions")
FILE = r"(?:megatron_k2|patches)/[\w/]+\.py"
NAME = re.compile(rf"`({FILE}|[A-Za-z_][\w.]*)`")
LISTED_LINES = 55
"""From here on a function is in the table."""
FOREIGN = {
    "megatron-core",
    "GPTModel",
    "pretrain",
    "sharded_state_dict",
    "torch_dist",
    "train_step",
}
"""Names of Megatron's."""
METHODS_OF_MANY = {"encode", "reset", "step"}
"""Of a protocol: said of whatever is behind it."""


@cache
def definitions(path: str) -> frozenset[str]:
    """Return the functions, classes (``Class.method`` too) and constants of a source file."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        found |= names_of(node)
    return frozenset(found)


def names_of(node: ast.stmt) -> set[str]:
    """Return what a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.ClassDef):
        return {node.name} | {
            f"{node.name}.{one.name}"
            for one in node.body
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return set()


def named(text: str) -> list[tuple[str, str]]:
    """Return (file, name) of everything that the walks say is in a file: the last one named."""
    found, path = [], ""
    for quoted in NAME.findall(text):
        if re.fullmatch(FILE, quoted):
            path = quoted
            found.append((path, ""))
        elif path and quoted not in FOREIGN | METHODS_OF_MANY:
            found.append((path, quoted))
    return found


def test_every_file_and_function_of_the_walks_is_there() -> None:
    walks = WALKS.partition("## A token")[2]
    paths = {path for path, _ in named(walks)}
    assert len(paths) > 50
    missing = [path for path in sorted(paths) if not (ROOT / path).is_file()]
    assert not missing
    everywhere = {name for path in paths for name in definitions(path)}
    for path, name in named(walks):
        # Further down a paragraph a name may be of a file named before.
        is_there = not name or name in definitions(path) or name in everywhere
        assert is_there, f"{path}: {name}"


@pytest.mark.parametrize("line", [line for line in WALKS.splitlines() if ".py`: `" in line])
def test_a_name_right_behind_a_file_is_in_it(line: str) -> None:
    for path, name in re.findall(rf"`({FILE})`:\s+`([\w.]+)`", line):
        assert name in definitions(path), f"{path}: {name}"


def test_the_table_has_every_long_function() -> None:
    rows = re.findall(rf"^\| `({FILE})`: `(\w+)` \| \S", TABLE, re.MULTILINE)
    long = {
        (str(path.relative_to(ROOT)), node.name)
        for folder in ("megatron_k2", "patches")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_symlink()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 >= LISTED_LINES
    }
    assert set(rows) == long, "shorten what is new, or say in the table why it is one function"
