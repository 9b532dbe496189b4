"""``tools/doctor.py``: a downloaded release, compared with everything this package assumes of it.

None of Kimi K2's files could be had while the conversion, the tokenizer and the chat format were
written: they rest on public descriptions. This looks at the files that you have. Nothing of the
folder is run, no tensor is read, and a folder of the small files alone will do.

examples:
  # configuration, index, tokenizer, chat template, and the headers of the shards that are there
  doctor.py --release Kimi-K2-Instruct
  doctor.py --release Moonlight-16B-A3B-Instruct --k2-preset moonlight-16b-a3b
  # the same for a program, or to compare two downloads
  doctor.py --release Kimi-K2-Instruct --json

Ends with 0 if nothing differs, 1 if something does, 2 if the folder is no release. What is missing
is said and is no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_k2.chat.tokenizer import RANK_FILE
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.folder import CONFIG, INDEX, SINGLE, SMALL_FILE_BYTES
from megatron_k2.checkpoint.release.chat import check_chat
from megatron_k2.checkpoint.release.check import DIFFERS, MISSING, OK, Check
from megatron_k2.checkpoint.release.config import check_config, check_generation
from megatron_k2.checkpoint.release.expected import RELEASES, Expected, expected
from megatron_k2.checkpoint.release.tensors import check_tensors
from megatron_k2.checkpoint.release.tokenizer import check_tokenizer

_SIGNS = (CONFIG, INDEX, SINGLE, RANK_FILE)
_WIDTH = 64  # of a value in the table; --json has it whole


@dataclass(frozen=True)
class SmallFile:
    """A file beside the weights; ``published`` says whose it is, where its sum is known."""

    name: str
    num_bytes: int
    sha256: str
    published: str


@dataclass(frozen=True)
class Report:
    """All checks of a folder, and the sums of its small files."""

    release: Path
    label: str
    checks: tuple[Check, ...]
    files: tuple[SmallFile, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of checks by status."""
        found = Counter(check.status for check in self.checks)
        return {status: found[status] for status in (OK, DIFFERS, MISSING)}


def examine(folder: Path, assumed: Expected) -> Report:
    """Compare a folder with what is assumed of a release.

    Raises:
        ConversionRefused: the folder is no release.
    """
    if not folder.is_dir():
        raise ConversionRefused(f"--release {folder}: not a folder")
    if not any((folder / name).is_file() for name in _SIGNS):
        raise ConversionRefused(
            f"--release {folder}: no release; none of {', '.join(_SIGNS)} is there"
        )
    checks = (
        *check_config(folder, assumed),
        *check_generation(folder, assumed),
        *check_tensors(folder, assumed),
        *check_tokenizer(folder, assumed),
        *check_chat(folder),
    )
    return Report(folder, assumed.label, checks, tuple(_small_files(folder, assumed)))


def _small_files(folder: Path, assumed: Expected) -> list[SmallFile]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix == ".safetensors" or not path.is_file():
            continue
        num_bytes = path.stat().st_size
        if num_bytes > SMALL_FILE_BYTES:
            continue
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        published = assumed.published.get(path.name, {}).get(sha256, "")
        found.append(SmallFile(path.name, num_bytes, sha256, published))
    return found


def as_text(report: Report) -> str:
    """Return the table that a person reads."""
    lines = [f"{report.release}: compared with what {report.label} is taken for"]
    for area, checks in groupby(report.checks, attrgetter("area")):
        lines.append(area)
        lines += [line for check in checks for line in _lines(check)]
    lines.append("files (SHA-256, to compare two downloads)")
    for file in report.files:
        whose = f"  published: {file.published}" if file.published else ""
        lines.append(f"  {file.sha256}  {file.name}  {file.num_bytes:,} bytes{whose}")
    counts = report.counts
    lines.append(
        f"{counts[OK]} ok, {counts[DIFFERS]} differ, {counts[MISSING]} not here to compare"
    )
    return "\n".join(lines)


def _lines(check: Check) -> list[str]:
    head = f"  {check.status:8s}{check.name:40s} "
    if check.status == OK:
        return [head + _short(check.found)]
    note = f"  ({check.note})" if check.note else ""
    return [
        f"{head}assumed {_short(check.assumed)}",
        f"  {'':48s} found   {_short(check.found)}{note}",
    ]


def _short(value: Any) -> str:
    text: str = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        text = value.replace("\n", "\\n")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def as_json(report: Report) -> str:
    """Return the report as one JSON object, every value whole."""
    record: dict[str, Any] = {"release": str(report.release), "assumed": report.label}
    record["counts"] = report.counts
    record["checks"] = [asdict(check) for check in report.checks]
    record["files"] = [asdict(file) for file in report.files]
    return json.dumps(record, ensure_ascii=False)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--release", type=Path, required=True, metavar="DIR", help="the download")
    parser.add_argument(
        "--k2-preset", choices=RELEASES, default="kimi-k2", help="what it should be"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compare a folder and print what was found; return the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        report = examine(arguments.release, expected(arguments.k2_preset))
    except (ConversionRefused, OSError) as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 2
    print(as_json(report) if arguments.json else as_text(report))
    return 1 if report.counts[DIFFERS] else 0


if __name__ == "__main__":
    sys.exit(main())
