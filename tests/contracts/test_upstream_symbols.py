"""Every upstream symbol that our code names exists in the installed Megatron and torch.

The table is derived: imports of ``megatron`` anywhere in our sources, attributes read from imported
upstream modules, the targets of all patches, and torch's private names. An upgrade of Megatron
fails here first, with the list of what is gone and who used it.
"""

import ast
from functools import cache
from pathlib import Path

from tests.contracts.upstream_source import ROOT, module_file, names_of, our_files


def is_upstream(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "megatron"


@cache
def symbols_used() -> dict[tuple[str, str], str]:
    """(module, name) -> the file of ours that names it; name is empty for a bare module."""
    used: dict[tuple[str, str], str] = {}
    for path in our_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for symbol in imports_of(tree) | attributes_of(tree):
            used.setdefault(symbol, str(path.relative_to(ROOT)))
    return used


def imports_of(tree: ast.Module) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_upstream(node.module):
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if is_upstream(alias.name)}
    return found


def attributes_of(tree: ast.AST) -> set[tuple[str, str]]:
    """``module.name`` where ``module`` was imported from upstream under that alias.

    A function's own imports hold in that function only.
    """
    found: set[tuple[str, str]] = set()

    def visit(node: ast.AST, aliases: dict[str, str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.Module):
            aliases = aliases | aliases_bound_in(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = aliases.get(node.value.id, "")
            if module and not node.attr.startswith("__"):
                found.add((module, node.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, aliases)

    visit(tree, {})
    return found


def aliases_bound_in(scope: ast.FunctionDef | ast.Module) -> dict[str, str]:
    """Alias -> upstream module ("" for any other import), of one scope without nested functions."""
    aliases = {}
    pending: list[ast.AST] = list(scope.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                module = prefix + alias.name
                known = is_upstream(module) and module_file(module) is not None
                if alias.asname or prefix:
                    aliases[alias.asname or alias.name] = module if known else ""
        pending.extend(ast.iter_child_nodes(node))
    return aliases


def test_every_upstream_symbol_we_name_exists() -> None:
    missing = [
        f"{module}:{name or '(module)'} used by {user}"
        for (module, name), user in sorted(symbols_used().items())
        if module_file(module) is None or (name and name not in names_of(module))
    ]
    assert not missing, "gone from the installed Megatron:\n" + "\n".join(missing)


def test_the_table_is_not_empty() -> None:
    """The walk finds what we know is there; an empty table would pass everything."""
    assert (
        "megatron.core.transformer.transformer_config",
        "MLATransformerConfig",
    ) in symbols_used()
    assert ("megatron.core", "parallel_state") in symbols_used()
    assert len(symbols_used()) > 20


def test_every_patch_target_exists_as_a_name_of_its_module() -> None:
    from megatron_k2.patches import ALL_PATCHES

    missing = []
    for patch in ALL_PATCHES:
        module, _, path = patch.target.partition(":")
        if is_upstream(module) and path.split(".")[0] not in names_of(module):
            missing.append(f"{patch.id}: {patch.target}")
    assert not missing, "\n".join(missing)


def private_torch_names() -> dict[str, str]:
    """Dotted torch names with a private part -> the file of ours that uses it."""
    found: dict[str, str] = {}
    for path in our_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                parts = dotted.split(".")
                private = parts[-1].startswith("_") and not parts[-1].startswith("__")
                if parts[0] == "torch" and private and all(p.isidentifier() for p in parts):
                    found.setdefault(dotted, str(path.relative_to(ROOT)))
    return found


def test_every_private_torch_name_we_use_exists() -> None:
    import torch

    missing = []
    for dotted, user in private_torch_names().items():
        value: object = torch
        for part in dotted.split(".")[1:]:
            value = getattr(value, part, None)
        if value is None:
            missing.append(f"{dotted} used by {user}")
    assert not missing, f"gone from torch {torch.__version__}:\n" + "\n".join(missing)


def test_names_of_reads_branches_and_submodules(tmp_path: Path) -> None:
    assert "Adam" in names_of("megatron.core.optimizer")
    assert "distrib_optimizer" in names_of("megatron.core.optimizer")
    assert "no_such_name" not in names_of("megatron.core.optimizer")
