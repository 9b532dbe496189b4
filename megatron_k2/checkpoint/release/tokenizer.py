"""The tokenizer's files: ranks, special ids, and the code of the release read as text.

``tokenization_kimi.py`` is parsed, never imported or run. Its pattern and constants are compared
with ours, and the two functions that cut and encode by a digest of their syntax tree, without
comments, docstrings and logging.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_k2.chat.special_tokens import (
    CONFIG_FILE,
    NUM_SPECIAL,
    ROLES,
    added_tokens,
    read_config,
)
from megatron_k2.chat.tokenizer import (
    MAX_RUN_CHARS,
    MAX_SLICE_CHARS,
    PATTERN,
    RANK_FILE,
    KimiTokenizer,
)
from megatron_k2.checkpoint.release.check import DIFFERS, Check, absent, compare, none_of
from megatron_k2.checkpoint.release.expected import Expected

CODE_FILE = "tokenization_kimi.py"
FAST_FILE = "tokenizer.json"
CONSTANTS: Mapping[str, int] = {
    "TIKTOKEN_MAX_ENCODE_CHARS": MAX_SLICE_CHARS,
    "MAX_NO_WHITESPACES_CHARS": MAX_RUN_CHARS,
    "num_reserved_special_tokens": NUM_SPECIAL,
}


def check_tokenizer(folder: Path, expected: Expected) -> Iterator[Check]:
    """Yield the checks of ranks, names and code."""
    yield from _check_ranks(folder, expected)
    yield from _check_names(folder, expected)
    yield from _check_code(folder, expected)
    found = f"{FAST_FILE} is here" if (folder / FAST_FILE).exists() else "none"
    note = "an automatic conversion; megatron_k2 does not read it, other programs may"
    yield compare("tokenizer", f"{FAST_FILE} of a conversion", "none", found, note)


def _check_ranks(folder: Path, expected: Expected) -> Iterator[Check]:
    vocab_size = expected.config["vocab_size"]
    if not (folder / RANK_FILE).is_file():
        yield absent(RANK_FILE, "number of ranks", expected.num_ranks, RANK_FILE)
        return
    try:
        tokenizer = KimiTokenizer(folder)
    except ValueError as error:
        yield Check(RANK_FILE, "readable", f"{expected.num_ranks} ranks", str(error), DIFFERS)
        return
    yield compare(RANK_FILE, "number of ranks", expected.num_ranks, tokenizer.num_ranks)
    name = f"ranks and {NUM_SPECIAL} special ids are the vocabulary"
    yield compare(RANK_FILE, name, vocab_size, tokenizer.vocab_size)
    for text, ids in expected.known_ids:
        found = tuple(tokenizer.encode(text, control_tokens=True))
        yield compare(RANK_FILE, f"ids of {text[:40]!r}", list(ids), list(found))


def _check_names(folder: Path, expected: Expected) -> Iterator[Check]:
    if not (folder / CONFIG_FILE).is_file():
        yield absent(
            CONFIG_FILE, "names of special ids", f"{len(expected.named)} names", CONFIG_FILE
        )
        return
    try:
        config = read_config(folder / CONFIG_FILE)
        names = {name: token for token, name in added_tokens(config).items()}
    except ValueError as error:
        yield Check(CONFIG_FILE, "readable", "names of special ids", str(error), DIFFERS)
        return
    for name, token in expected.named.items():
        yield compare(CONFIG_FILE, f"id of {name}", token, names.get(name, "not named"))
    others = [f"{name} {names[name]}" for name in names if name not in expected.named]
    yield none_of(CONFIG_FILE, "other names", others, limit=10)
    for role, name in ROLES.items():
        given = config.get(f"{role}_token", "not in the file")
        given = given.get("content") if isinstance(given, Mapping) else given
        yield compare(CONFIG_FILE, f"{role}_token", name, given)
    yield compare(
        CONFIG_FILE, "tokenizer_class", "TikTokenTokenizer", config.get("tokenizer_class")
    )


def _check_code(folder: Path, expected: Expected) -> Iterator[Check]:
    if not (folder / CODE_FILE).is_file():
        yield absent(CODE_FILE, "pattern, constants, functions", "as in this package", CODE_FILE)
        return
    try:
        tree = ast.parse((folder / CODE_FILE).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        yield Check(CODE_FILE, "readable", "Python", str(error), DIFFERS)
        return
    values = _assigned(tree)
    yield compare(CODE_FILE, "pat_str", PATTERN, values.get("pat_str", "not found"))
    for name, value in CONSTANTS.items():
        yield compare(CODE_FILE, name, value, values.get(name, "not found"))
    digests = {
        node.name: digest(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    for name, known in expected.functions.items():
        found = digests.get(name, "not found")
        note = "written differently: read it before trusting the ids"
        yield compare(CODE_FILE, f"{name}() (digest)", known, found, note)


def _assigned(tree: ast.Module) -> dict[str, Any]:
    """Return the literal values that names are assigned anywhere; ``"|".join([...])`` included."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        try:
            match value:
                case ast.Call(
                    func=ast.Attribute(value=ast.Constant(value=str(glue)), attr="join"),
                    args=[parts],
                ):
                    found[name] = glue.join(ast.literal_eval(parts))
                case _:
                    found[name] = ast.literal_eval(value)
        except (TypeError, ValueError):
            continue  # not a literal
    return found


def digest(function: ast.FunctionDef) -> str:
    """Return 12 hex digits of a function's code without comments, docstring and logging."""
    return hashlib.sha256(ast.unparse(_Bare().visit(function)).encode()).hexdigest()[:12]


class _Bare(ast.NodeTransformer):
    """Drops strings that stand alone and calls of a logger."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        match node.value:
            case ast.Constant(value=str()):
                return None
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"))):
                return None
        return node
