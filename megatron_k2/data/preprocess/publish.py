"""Gives finished files their names: ``PREFIX_KEY_document.bin/.idx``, provenance, ``PREFIX.json``.

All files are whole and on the disk under other names before the first is renamed; the ``.idx``
files, without which no reader opens anything, come last. A kill between two renames is mended by
the same command. ``PREFIX.json`` has the checksums of all others.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.checkpoint.intact import FileRecord, publish_text, record_file
from megatron_k2.checkpoint.stream import journal
from megatron_k2.data.preprocess.index_file import write_index
from megatron_k2.data.preprocess.job import Job
from megatron_k2.data.preprocess.merge import Totals

_RENAMES = "renames.json"


def outputs(prefix: Path, job: Job) -> dict[str, Path]:
    """Return name below the unfinished folder -> published file, in the order of publication."""
    bases = [f"{prefix}_{key}_{job.level}" for key in job.options.json_keys]
    found = {f"{key}.bin": Path(f"{base}.bin") for key, base in enumerate(bases)}
    found["provenance"] = Path(f"{prefix}.provenance.bin")
    if job.dedup != "none":
        found["dropped"] = Path(f"{prefix}.dropped.bin")
    found["summary"] = Path(f"{prefix}.json")
    return found | {f"{key}.idx": Path(f"{base}.idx") for key, base in enumerate(bases)}


def finish(
    folder: Path,
    prefix: Path,
    job: Job,
    dtype: np.dtype,
    totals: Totals,
    crcs: list[int],
    settings: dict[str, Any],
) -> None:
    """Write index files and summary, then the list of renames, which makes the output final."""
    files = outputs(prefix, job)
    for key in range(len(job.options.json_keys)):
        lengths, documents = folder / f"{key}.lengths", folder / f"{key}.documents"
        write_index(folder / f"{key}.idx", lengths, documents, dtype)
    known = {
        f"{key}.bin": FileRecord((folder / f"{key}.bin").stat().st_size, f"{crc:08x}")
        for key, crc in enumerate(crcs)
    }
    checksums = {
        path.name: asdict(known.get(name) or record_file(folder / name))
        for name, path in files.items()
        if name != "summary"
    }
    summary = {
        "version": 1,
        "files": checksums,
        "dtype": dtype.name,
        "totals": asdict(totals),
        "settings": settings,
        "sources": _sources(job),
    }
    publish_text(folder / "summary", json.dumps(summary, indent=1) + "\n")
    publish_text(folder / _RENAMES, json.dumps(list(files)))
    sync_folder(folder)


def done_before(folder: Path, prefix: Path, job: Job, settings: dict[str, Any]) -> Totals | None:
    """Return what was counted if an earlier run published this very job's output, else None.

    So ends the same command after a kill between the last rename and the end. Sizes are compared,
    not checksums: reading all would take as long as ``verify``. What the folder still has goes.
    """
    files = outputs(prefix, job)
    if is_final(folder) or not all(path.is_file() for path in files.values()):
        return None
    try:
        summary = json.loads(files["summary"].read_text())
        if summary["settings"] != settings or summary["sources"] != _sources(job):
            return None
        sizes = {name: file["size_bytes"] for name, file in summary["files"].items()}
        totals = Totals(**summary["totals"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if sizes != {p.name: p.stat().st_size for k, p in files.items() if k != "summary"}:
        return None
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {journal.NAME}:
        (folder / journal.NAME).unlink(missing_ok=True)
        folder.rmdir()
    return totals


def _sources(job: Job) -> list[dict[str, Any]]:
    """Return the state of every source as the summary has it."""
    names = ("path", "format", "num_bytes", "mtime_ns")
    return [{name: getattr(source, name) for name in names} for source in job.sources]


def is_final(folder: Path) -> bool:
    """Return whether ``finish`` came to its end: nothing but renames is left."""
    return (folder / _RENAMES).is_file()


def rename(folder: Path, prefix: Path, job: Job) -> None:
    """Give the files their names, and remove the folder; again after a kill.

    The list of renames goes after the data and before the journal: nothing is ever merged into what
    is left, and the journal keeps the folder to its job.
    """
    for name, path in outputs(prefix, job).items():
        if (folder / name).exists():
            os.replace(folder / name, path)
    sync_folder(prefix.parent)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_RENAMES, journal.NAME):
            path.unlink()
    (folder / _RENAMES).unlink()
    (folder / journal.NAME).unlink()
    folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(prefix: str) -> list[str]:
    """Read all files of an output; return what is wrong, a line each.

    Raises:
        ValueError: there is no ``PREFIX.json``, or it is none of this tool's.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise ValueError(f"{path}: not there; PREFIX is what --output-prefix was")
    problems = []
    try:
        files = json.loads(path.read_text())["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not of this tool; write the output anew") from error
    for name, wanted in files:
        file = path.with_name(name)
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif (size := file.stat().st_size) != wanted["size_bytes"]:
            problems.append(f"{file}: {size:,} bytes, and {wanted['size_bytes']:,} were written")
        elif (crc := record_file(file).crc32) != wanted["crc32"]:
            problems.append(f"{file}: checksum {crc}, and {wanted['crc32']} was written: damaged")
    return problems
