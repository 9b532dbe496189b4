"""Runs in the sandbox: checks of the files that a dialogue left (``evidence.KINDS``).

Reads ``{NAME: CHECK}`` and prints ``{NAME: [HOLDS, FOUND]}``. Checks that run programs come last.
The standard library alone; the source is the program.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS, CPU_SECONDS = 120, 20  # of the clock: a machine under load gives little of each second
MAX_FOUND = 1000  # characters
Check = dict[str, Any]
Verdict = tuple[bool, Any]


def text(check: Check) -> Verdict:
    """A file's text equals, contains or lacks."""
    path = Path(check["path"])
    if not path.is_file() or path.is_symlink():
        return False, "no file"
    found = path.read_text(encoding="utf-8", errors="replace")
    holds = ("equals" not in check or found.strip() == check["equals"].strip()) and all(
        (part in found) is wanted
        for key, wanted in (("contains", True), ("lacks", False))
        for part in _list(check.get(key, []))
    )
    return holds, found


def absent(check: Check) -> Verdict:
    """There is no such path."""
    there = os.path.lexists(check["path"])
    return not there, "there" if there else "absent"


def json_value(check: Check) -> Verdict:
    """A value of a file of JSON equals."""
    found = json.loads(Path(check["path"]).read_text(encoding="utf-8"))
    for key in check["at"]:
        found = found[key]
    return found == check["equals"], found


def sqlite(check: Check) -> Verdict:
    """A query gives these rows."""
    with sqlite3.connect(f"file:{check['path']}?mode=ro", uri=True) as database:
        found = [list(row) for row in database.execute(check["query"]).fetchmany(100)]
    return found == check["rows"], found


def git(check: Check) -> Verdict:
    """The log, the branch or a clean tree of the repository in ``path``."""
    where = check.get("path", ".")
    found: dict[str, Any] = {
        "log": _git(where, "log", "--format=%s").splitlines(),
        "branch": _git(where, "branch", "--show-current").strip(),
        "clean": not _git(where, "status", "--porcelain").strip(),
    }
    return all(found[key] == check[key] for key in found if key in check), found


def run(check: Check) -> Verdict:
    """A program ends with a status; its files replace those of the dialogue."""
    for name, content in check.get("files", {}).items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.write_text(content, encoding="utf-8")
    argv = [sys.executable if one == "python" else one for one in check["argv"]]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    cpu_s = check.get("cpu_s", CPU_SECONDS)

    def limit_cpu() -> None:
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        hard = cpu_s + 1 if most == resource.RLIM_INFINITY else min(most, cpu_s + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (min(hard, cpu_s), hard))

    try:
        done = subprocess.run(  # type: ignore[call-overload]
            argv, timeout=SECONDS, check=False, preexec_fn=limit_cpu, **streams
        )
    except subprocess.TimeoutExpired:
        return False, f"more than {SECONDS} s"
    if done.returncode == -signal.SIGXCPU:
        return False, f"more than {cpu_s} s of the processor"
    holds = done.returncode == check.get("status", 0)
    words = done.stdout.decode(errors="replace")[-MAX_FOUND:]
    return holds, f"exit status {done.returncode}" if holds else words


KINDS = {
    "text": text,
    "absent": absent,
    "json": json_value,
    "sqlite": sqlite,
    "git": git,
    "run": run,
}


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _git(where: str, *words: str) -> str:
    """Ask git, with nothing of the repository's own that runs programs."""
    argv = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    argv += ["-c", "safe.directory=*", "-C", where, *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


def main() -> None:
    """Check all."""
    checks = json.load(sys.stdin)
    sys.dont_write_bytecode = True
    verdicts: dict[str, Verdict] = {}
    for name in sorted(checks, key=lambda name: checks[name]["kind"] == "run"):
        try:
            holds, found = KINDS[checks[name]["kind"]](checks[name])
        except Exception as error:  # whatever is wrong with the files, the check does not hold
            holds, found = False, f"{type(error).__name__}: {error}"
        if len(json.dumps(found)) > MAX_FOUND:
            found = json.dumps(found)[:MAX_FOUND]
        verdicts[name] = (holds, found)
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
