"""Do the documents agree with the code? Run by ``make docs-check`` and by a test.

Checks README.md, CONTRIBUTING.md and CHANGELOG.md: every relative link and every path in backquotes
exists, every ``make`` target named exists, the table of presets has each preset's numbers, and the
newest version of the changelog is the package's. In docs/ and the READMEs of all rooms, links and
paths that begin at the root exist. Commands are checked by tests/docs, prose is not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_k2 import __version__  # noqa: E402  found through the line above
from megatron_k2.presets import list_presets, load_preset  # noqa: E402

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
ROOMS = ("docs", "examples", "megatron_k2", "patches", "tests", "tools")
MEGATRONS = ("tools/checkpoint/convert.py",)  # of a Megatron-LM checkout


def main() -> int:
    """Print every disagreement; returns 1 if there is one."""
    problems = [f"{name}: {p}" for name in DOCUMENTS for p in problems_of(ROOT / name)]
    problems += [problem for room in ROOMS for problem in room_problems(ROOT / room)]
    problems += preset_problems((ROOT / "README.md").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if newest is None or newest[1] != __version__:
        problems.append(f"CHANGELOG.md: newest entry is not {__version__}")
    print("\n".join(problems) or f"docs-check: {', '.join(DOCUMENTS)} agree with the code")
    return bool(problems)


def problems_of(document: Path) -> list[str]:
    """Return the links, paths and make targets of one document that do not exist."""
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = [
        f"link to {link}"
        for link in re.findall(r"\]\(([^)#:]+)\)", text)
        if not (ROOT / link).exists()
    ]
    for quoted in re.findall(r"`([^`\n]+)`", text):
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", quoted) and "/" in quoted
        written_later = quoted.startswith((".venv", "out")) or "NAME" in quoted
        if is_path and not written_later and not (ROOT / quoted).exists():
            found.append(f"path {quoted}")
    for command in re.findall(r"\bmake ((?:[a-z-]+ ?)+)(?=[`\n ])", code_of(text)):
        found += [f"make {word}" for word in command.split() if word not in targets]
    return found


def room_problems(room: Path) -> list[str]:
    """Return the links and paths of a folder's documents that do not exist."""
    found = []
    for document in sorted(room.rglob("*.md")):
        text, name = document.read_text(encoding="utf-8"), document.relative_to(ROOT)
        links = re.findall(r"\]\(([^)#:]+)[)#]", text)
        found += [
            f"{name}: link to {link}" for link in links if not (document.parent / link).exists()
        ]
        paths = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]+)`", text)
        written = {*re.findall(r"<!-- file: (\S+) -->", text), *MEGATRONS}
        found += [
            f"{name}: path {path}"
            for path in paths
            if path not in written and not (ROOT / path).exists()
        ]
    return found


def code_of(markdown: str) -> str:
    """Return the code of a document: fenced blocks and backquoted spans, a line each."""
    fenced = re.findall(r"```\n(.*?)```", markdown, re.DOTALL)
    lines = [line.partition("#")[0] for block in fenced for line in block.splitlines()]
    rest = re.sub(r"```\n.*?```", "", markdown, flags=re.DOTALL)
    return "\n".join([*lines, *re.findall(r"`([^`\n]+)`", rest)]) + "\n"


def preset_problems(readme: str) -> list[str]:
    """Return the rows of the preset table that are missing or state other numbers."""
    rows = {
        cells[0].strip("`"): cells[1:4]
        for line in readme.splitlines()
        if line.startswith("| `k") or line.startswith("| `moonlight")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    problems = [f"README.md: no row for preset {n}" for n in list_presets() if n not in rows]
    for name, row in rows.items():
        preset = load_preset(name)
        experts = f"{preset.value('num_experts')}, top-{preset.value('moe_router_topk')}"
        true = [str(preset.value("num_layers")), str(preset.value("hidden_size")), experts]
        if row != true:
            problems.append(f"README.md: preset {name} says {row}, its file says {true}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
