"""One thing that the doctor looked at, and how all of them are printed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter

OK = "ok"
NOTE = "note"  # works, and could be better
ABSENT = "absent"  # optional and not installed
IDLE = "idle"  # installed, and this machine has nothing for it to run on
BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        area: heading that it stands under.
        name: of the thing.
        status: one of the above.
        said: what was found, and what is needed or enabled.
        mend: the command line, or the step, that changes it; empty where nothing is to change.
    """

    area: str
    name: str
    status: str
    said: str
    mend: str = ""


def pip_install(*wanted: str) -> str:
    """Return the line that installs requirements into the interpreter that runs this."""
    return by_this_pip("pip install " + " ".join(f"'{one}'" for one in wanted))


def by_this_pip(line: str) -> str:
    """Return an install line with the pip of the interpreter that runs this; other lines as is."""
    if not line.startswith("pip "):
        return line
    found = shutil.which("python")
    ours = found is not None and os.path.abspath(found) == os.path.abspath(sys.executable)
    return f"{'python' if ours else sys.executable} -m {line}"


def num_broken(findings: Sequence[Finding]) -> int:
    """Return how many are broken."""
    return sum(one.status == BROKEN for one in findings)


def as_text(head: str, findings: Sequence[Finding]) -> str:
    """Return the table that a person reads, what is wrong last."""
    lines = [head]
    for area, group in groupby(findings, attrgetter("area")):
        lines.append(area)
        for one in group:
            lines.append(f"  {one.status:7}{one.name:22} {one.said}".rstrip())
            if one.mend and one.status != BROKEN:
                lines.append(f"  {'':30}{one.mend}")
    wrong = [one for one in findings if one.status == BROKEN]
    if wrong:
        lines.append("wrong, and what mends it")
    for one in wrong:
        lines += [f"  {one.name}: {one.said}", f"      {one.mend}"]
    counts = Counter(one.status for one in findings)
    lines.append(
        ", ".join(f"{counts[status]} {status}" for status in (OK, NOTE, ABSENT, IDLE, BROKEN))
    )
    return "\n".join(lines)


def as_json(head: str, findings: Sequence[Finding]) -> str:
    """Return one JSON object."""
    status = BROKEN if num_broken(findings) else OK
    record = {"about": head, "status": status, "findings": [asdict(one) for one in findings]}
    return json.dumps(record, ensure_ascii=False)
