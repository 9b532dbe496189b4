"""Reads the installed Megatron as text: which names a module has, without importing it.

Some upstream modules refuse to be imported without Transformer Engine, and importing the others
takes ten seconds; whether a name exists can be read.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megatron_k2 import compat

ROOT = Path(__file__).resolve().parents[2]


def module_file(module: str) -> Path | None:
    """The file of a dotted upstream module, None where there is none, the folder of a namespace."""
    path = compat.megatron_root().joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return path if path.is_dir() else None


@cache
def names_of(module: str) -> frozenset[str]:
    """Every name bound at the top level of an upstream module, in any branch; its submodules."""
    path = module_file(module)
    if path is None:
        return frozenset()
    names = set()
    folder = path if path.is_dir() else path.parent if path.name == "__init__.py" else None
    if folder is not None:
        names |= {entry.stem for entry in folder.iterdir() if entry.suffix in ("", ".py")}
    if path.is_file():
        for node in top_level(ast.parse(path.read_text(encoding="utf-8")).body):
            names |= bound_by(node)
    return frozenset(names)


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those inside if, try and with."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from top_level(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from top_level(handler.body)


def bound_by(node: ast.stmt) -> set[str]:
    """The names that one statement binds."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {alias.asname or alias.name.split(".")[0] for alias in aliases}
        case ast.Assign(targets=targets):
            return {leaf.id for t in targets for leaf in ast.walk(t) if isinstance(leaf, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


def our_files() -> list[Path]:
    """Every Python file of the package, the patches and the tools."""
    return [
        path
        for folder in ("megatron_k2", "patches", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]
