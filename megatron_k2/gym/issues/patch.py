"""Changes to files as a model writes them: unified diffs, and search/replace blocks.

Applied to texts in memory, strictly: what is to be replaced must be there, once. Only line numbers
of a diff may be wrong, as models' mostly are. Nothing here touches a disk or runs anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

Files = Mapping[str, str | None]
"""Path -> text; None: the file is not there (any more)."""

_BLOCK = re.compile(
    r"^[ \t`*#]*(?:File: *)?(?P<path>[\w./\-]+)[`* \t:]*\n(?:```\w*\n)?"
    r"<{5,9} ?SEARCH\n(?P<old>.*?)^={5,9}\n(?P<new>.*?)^>{5,9} ?REPLACE",
    re.M | re.S,
)
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_FENCE = re.compile(r"^```(?:diff|patch)?[ \t]*\n(.*?)^```[ \t]*$", re.M | re.S)


class PatchError(ValueError):
    """A change that cannot be applied."""


def changes_of(text: str, files: Mapping[str, str]) -> dict[str, str | None]:
    """Return the files that an answer changes, changed.

    Args:
        text: with search/replace blocks, or else a unified diff, fenced or not.
        files: path -> text of the repository.

    Raises:
        PatchError: there is no change in it, or one that cannot be applied; says which.
    """
    blocks = list(_BLOCK.finditer(text))
    if blocks:
        changed: dict[str, str | None] = {}
        for block in blocks:
            path = checked(block["path"])
            before = changed.get(path, files.get(path)) or ""
            changed[path] = replaced(before, block["old"], block["new"], path)
        return changed
    fenced = [body for body in _FENCE.findall(text) if "\n+++ " in f"\n{body}"]
    diff = "".join(fenced) or (text if "\n+++ " in f"\n{text}" else "")
    if not diff:
        raise PatchError("no search/replace block and no diff")
    return apply_diff(diff, files)


def replaced(text: str, old: str, new: str, path: str) -> str:
    """Return a text with one part replaced; an empty old part is the whole of an empty file.

    Raises:
        PatchError: the part is not there, or more than once.
    """
    if not old.strip():
        if text.strip():
            raise PatchError(f"{path} is there already: say what to replace")
        return new
    count = text.count(old)
    if count != 1:
        raise PatchError(f"{path}: what to replace is there {count} times: {old[:80]!r}")
    return text.replace(old, new)


def checked(path: str) -> str:
    """Return a path that stays in the repository.

    Raises:
        PatchError: it does not.
    """
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or ".." in parts or ".git" in parts or "\0" in path:
        raise PatchError(f"path {path!r} is not of the repository")
    return str(PurePosixPath(path))


def apply_diff(diff: str, files: Mapping[str, str]) -> dict[str, str | None]:
    """Apply a unified diff, as git writes it; return the files that it changes.

    Raises:
        PatchError: a hunk does not fit.
    """
    changed: dict[str, str | None] = {}
    lines = diff.splitlines(keepends=True)
    at = 0
    while at < len(lines):
        if not (lines[at].startswith("--- ") and lines[at + 1 : at + 2]):
            at += 1
            continue
        old_path, new_path = _path(lines[at]), _path(lines[at + 1])
        at += 2
        source = old_path or new_path
        if source is None:
            raise PatchError("a diff from nothing to nothing")
        text = changed.get(source, files.get(source))
        if old_path and text is None:
            raise PatchError(f"{old_path} is not there")
        before = (text or "").splitlines(keepends=True)
        after: list[str] = []
        done = 0
        while at < len(lines) and (match := _HUNK.match(lines[at])):
            old, new, at = _hunk(lines, at + 1)
            place = _place(before, old, max(0, int(match[1]) - 1), done, source)
            after += before[done:place] + new
            done = place + len(old)
        after += before[done:]
        if old_path and old_path != new_path:
            changed[old_path] = None
        if new_path:
            changed[new_path] = "".join(after)
    if not changed:
        raise PatchError("a diff without files")
    return changed


def _path(line: str) -> str | None:
    name = line[4:].split("\t")[0].strip()
    if name == "/dev/null":
        return None
    return checked(name[2:] if name.startswith(("a/", "b/")) else name)


def _hunk(lines: list[str], at: int) -> tuple[list[str], list[str], int]:
    """Return a hunk's old lines, new lines, and where it ends."""
    old: list[str] = []
    new: list[str] = []
    while at < len(lines):
        line = lines[at]
        if line.startswith("\\"):  # no newline at the end of the file
            last = lines[at - 1][:1]
            for side, marks in ((old, " -"), (new, " +")):
                if last in marks and side:
                    side[-1] = side[-1].rstrip("\n")
        elif line.startswith("@@") or line.startswith(("diff --git ", "--- ")):
            break
        elif line[:1] in " -+" or line == "\n":
            body = line[1:] if line != "\n" else line
            if line[:1] != "+":
                old.append(body)
            if line[:1] != "-":
                new.append(body)
        else:
            break
        at += 1
    return old, new, at


def _place(lines: list[str], old: list[str], wanted: int, start: int, path: str) -> int:
    """Return where lines stand, the nearest to where they are said to be."""
    if not old:
        return max(start, min(wanted + 1, len(lines))) if lines else 0
    found = [n for n in range(start, len(lines) - len(old) + 1) if lines[n : n + len(old)] == old]
    if not found:
        raise PatchError(f"{path}: these lines are not there: {''.join(old)[:120]!r}")
    return min(found, key=lambda n: abs(n - wanted))


def diff_of(before: Files, after: Files) -> str:
    """Return the unified diff of changed files, which ``apply_diff`` takes."""
    parts = []
    for path in sorted(after):
        old, new = before.get(path), after[path]
        if old == new:
            continue
        names = (
            (f"a/{path}" if old is not None else "/dev/null"),
            (f"b/{path}" if new is not None else "/dev/null"),
        )
        lines = difflib.unified_diff(
            (old or "").splitlines(keepends=True), (new or "").splitlines(keepends=True), *names
        )
        for line in lines:
            parts.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(parts)
