"""The floors of the package: an import only goes to a lower floor, and doors have one key."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_k2"
# Room -> floor. A module may import rooms of lower floors, and its own room.
FLOORS = {
    "adapters": 1,
    "chat": 1,
    "compat": 1,
    "presets": 1,
    "device": 1,
    "layouts": 1,
    "inputs": 1,
    "journal": 1,
    "upstream_errors": 1,
    "host_library": 0,
    "html_page": 0,
    "fp8": 1,
    "checkpoint": 2,
    "max_logit": 2,
    "offload_arena": 2,
    "parallel": 2,
    "flags": 2,
    "arguments": 3,
    "model": 4,
    "optimizer": 4,
    "engine": 5,
    "data": 5,
    "evaluation": 6,
    "registration": 6,
    "gym": 6,
    "rl": 7,
    "agentic": 7,
    "training": 8,
    "planning": 9,
    "life": 9,
    "doctor": 9,
    "gpu_check": 10,
    "commands": 10,
    "__main__": 11,
}
OPTIONAL_PACKAGES = {"transformer_engine", "apex", "amp_C", "emerging_optimizers", "ray"}
VERSION_READERS = {"importlib.metadata", "pkg_resources"}


@cache
def modules(folder: Path = PACKAGE) -> list[tuple[str, list[str]]]:
    """Every module of the package as (dotted path below megatron_k2, names that it imports)."""
    files = [path for path in sorted(folder.rglob("*.py")) if not path.is_symlink()]
    return [
        (
            ".".join(path.relative_to(folder).with_suffix("").parts),
            list(imported(ast.parse(path.read_text()))),
        )
        for path in files
        if path.relative_to(folder).parts[0] not in ("patches", "__init__.py")
    ]


def imported(tree: ast.Module) -> Iterator[str]:
    """Every dotted name that a module imports, inside functions too; ``from a import b`` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_stands_on_a_floor() -> None:
    unknown = {name.split(".")[0] for name, _ in modules()} - set(FLOORS)
    assert not unknown, f"give these rooms a floor in FLOORS: {unknown}"


def test_imports_only_go_down() -> None:
    upward = []
    for name, targets in modules():
        room = name.split(".")[0]
        for target in targets:
            head, _, rest = target.partition(".")
            below = rest.split(".")[0]
            if head != "megatron_k2" or below not in FLOORS or below == room:
                continue
            if FLOORS[below] >= FLOORS[room]:
                upward.append(f"{name} (floor {FLOORS[room]}) imports {target} ({FLOORS[below]})")
    assert not upward, "\n".join(upward)


def offenders(forbidden: set[str], allowed: set[str], folder: Path = PACKAGE) -> list[str]:
    """Modules outside ``allowed`` that import one of ``forbidden`` or something below it."""
    return [
        f"{name} imports {target}"
        for name, targets in modules(folder)
        if name not in allowed
        for target in targets
        if any(target == door or target.startswith(door + ".") for door in forbidden)
    ]


def test_only_registration_imports_patches() -> None:
    assert offenders({"megatron_k2.patches"}, {"registration"}) == []


def test_only_compat_reads_versions_and_optional_packages() -> None:
    # te_* modules are the Transformer Engine leaves, imported once compat has found it usable.
    te_leaves = {name for name, _ in modules() if name.split(".")[-1].startswith("te_")}
    assert offenders(VERSION_READERS, {"compat"}) == []
    assert offenders(OPTIONAL_PACKAGES, {"compat", *te_leaves}) == []


def test_only_parallel_imports_parallel_state() -> None:
    doors = {"megatron.core.parallel_state", "megatron.core.mpu"}
    assert offenders(doors, {"parallel"}) == []
    assert offenders(doors, set(), ROOT / "patches") == []


@pytest.mark.parametrize("room", ["presets", "layouts", "compat"])
def test_light_rooms_import_neither_torch_nor_megatron(room: str) -> None:
    code = (
        f"import sys, megatron_k2.{room}\n"
        "print([name for name in ('torch', 'megatron.core') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"
