"""The floors of the package: an import only goes to a lower floor, and doors have one key.

And its sizes: files that one reads at once, functions that fit on a screen.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

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
    "argument_checks": 3,
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
LARGEST_FILE, MEDIAN_FILE, LARGEST_FUNCTION = 500, 150, 70
"""Lines; the house style's: 500 and 70 are failures, 150 is what to aim at."""
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


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Inside a room too, and for types alone: a circle is one file in several parts."""
    names = {name.removesuffix(".__init__") for name, _ in modules()}
    graph = {name: files_of(targets, names) for name, targets in modules()}
    graph = {name.removesuffix(".__init__"): files for name, files in graph.items()}
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " <- ".join(circle)


def files_of(targets: list[str], names: set[str]) -> set[str]:
    """Return the files of the package among imported names: a module's, or its folder's."""
    found = set()
    for target in targets:
        inside = target.removeprefix("megatron_k2.")
        if inside != target:
            found |= {one for one in (inside, inside.rpartition(".")[0]) if one in names}
    return found


def sources() -> list[Path]:
    """Return every source file of the product: the package, its patches and tools."""
    folders = (PACKAGE, ROOT / "patches", ROOT / "tools")
    found = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [path for path in found if not path.is_symlink() and path.stat().st_size]


def test_files_are_small() -> None:
    lines = {path: path.read_text().count("\n") for path in sources()}
    large = [f"{path.relative_to(ROOT)}: {n}" for path, n in lines.items() if n > LARGEST_FILE]
    assert not large
    own = [n for path, n in lines.items() if path.name != "__init__.py"]
    assert median(own) < MEDIAN_FILE


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) >= LARGEST_FUNCTION
    ]
    assert not long


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
