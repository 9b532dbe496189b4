"""The whole pipeline by a script, small: what tests of it share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_k2.agentic.stages.command import run
from megatron_k2.agentic.stages.flags import STAGE_NAMES, parser

DUMP = {
    "name": "shelf",
    "category": "software_apps",
    "tools": [
        {
            "name": f"{verb}_book",
            "description": f"The tool to {verb} a book of the shelf, by what is known of it.",
            "inputSchema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in fields},
                "required": list(fields),
            },
        }
        for verb, fields in (
            ("create", ("title", "author")),
            ("get", ("book_id",)),
            ("update", ("book_id", "title")),
            ("delete", ("book_id",)),
        )
    ],
}
SIZE = ("--evolved-tools", "36", "--agents", "4", "--tasks", "16", "--server-share", "0.25")


def synthesize(out: Path, dump: Path | None, *more: str, **given: Any) -> list[str]:
    """Run the tool; ``given``: of ``command.run``."""
    model = () if "--model" in more else ("--model", "scripted")
    source = () if dump is None else ("--dump", str(dump))
    arguments = ["--out", str(out), *source, "--quiet", *SIZE, *model, *more]
    return run(parser().parse_args(["run", *arguments]), **given)


def published(out: Path) -> dict[str, bytes]:
    """Return the published files, manifests included."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for stage in STAGE_NAMES
        for path in sorted((out / stage).rglob("*"))
        if path.is_file()
    }
