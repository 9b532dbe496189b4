"""The part of the output that one block gives: tokens of each key, and one file of the rest.

``GROUP-BLOCK.KEY.tokens`` are written as they come; ``GROUP-BLOCK.npz``, written last and renamed
into place, makes the part whole. It has the tokens' checksums and its own (a ZIP archive's), so
that parts need not be flushed: one that a power cut tore is found out and made anew.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32


class Unit(NamedTuple):
    """One block of one source, or of a group of small ones."""

    group: int
    block: int


@dataclass
class Report:
    """What is known of a part besides its documents."""

    num_lines: int = 0
    num_bad: int = 0
    disk_bytes: int = 0
    is_last: bool = False
    control_texts: dict[str, int] = field(default_factory=dict)
    token_bytes: list[int] = field(default_factory=list)
    """Bytes of tokens of each key."""
    token_crcs: list[int] = field(default_factory=list)


@dataclass
class Part:
    """A whole part.

    Attributes:
        lengths: int32 [sequences] of each key.
        per_document: int32 [documents] of each key: sequences of each document.
        places: int64 [documents, 4]: the source's number, and see ``records.Batch``.
        hashes: uint64 [documents], or of length 0 where none are needed.
        bands: uint64 [documents, bands], likewise.
    """

    report: Report
    lengths: list[np.ndarray]
    per_document: list[np.ndarray]
    places: np.ndarray
    hashes: np.ndarray
    bands: np.ndarray


def token_path(folder: Path, unit: Unit, key: int) -> Path:
    """Return where a part's tokens are."""
    return folder / f"{unit.group:06d}-{unit.block:06d}.{key}.tokens"


def _rest_path(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.group:06d}-{unit.block:06d}.npz"


class PartWriter:
    """Writes one part."""

    def __init__(self, folder: Path, unit: Unit, num_keys: int, dtype: np.dtype) -> None:
        self._folder, self._unit, self._dtype = folder, unit, dtype
        paths = [token_path(folder, unit, key) for key in range(num_keys)]
        self._files = [open(path, "wb", buffering=0) for path in paths]  # noqa: SIM115
        self._arrays: dict[str, list[np.ndarray]] = {}
        self._crcs, self._sizes = [0] * num_keys, [0] * num_keys
        self.control_texts: Counter[str] = Counter()

    def add_tokens(
        self, key: int, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray
    ) -> None:
        """Append documents of one key; see ``sequences.assemble``."""
        data = memoryview(np.ascontiguousarray(tokens, dtype=self._dtype)).cast("B")
        self._crcs[key] = crc32(data, self._crcs[key])
        self._sizes[key] += len(data)
        while data:
            data = data[self._files[key].write(data) :]
        self.add(f"lengths{key}", lengths)
        self.add(f"per_document{key}", per_document)

    def add(self, name: str, array: np.ndarray) -> None:
        """Append to an array of the part."""
        self._arrays.setdefault(name, []).append(array)

    def close(self) -> None:
        """Close the files; the part is not whole."""
        for file in self._files:
            file.close()

    def finish(self, report: Report) -> None:
        """Make the part whole."""
        self.close()
        report.token_crcs, report.token_bytes = self._crcs, self._sizes
        report.control_texts = dict(self.control_texts)
        arrays = {name: np.concatenate(pieces) for name, pieces in self._arrays.items()}
        arrays["report"] = np.frombuffer(json.dumps(asdict(report)).encode(), dtype=np.uint8)
        path = _rest_path(self._folder, self._unit)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)


def load_part(folder: Path, unit: Unit, num_keys: int) -> Part | None:
    """Return a part; None if it is not there, not whole, or torn."""
    path = _rest_path(folder, unit)
    try:
        with np.load(path) as archive:
            arrays = dict(archive)
        report = Report(**json.loads(arrays["report"].tobytes()))
        sizes = [token_path(folder, unit, key).stat().st_size for key in range(num_keys)]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
    if sizes != report.token_bytes:
        return None

    def array(name: str, dtype: Any, width: int = 0) -> np.ndarray:
        shape = (0, width) if width else (0,)
        return arrays.get(name, np.empty(shape, dtype=dtype))

    return Part(
        report=report,
        lengths=[array(f"lengths{key}", np.int32) for key in range(num_keys)],
        per_document=[array(f"per_document{key}", np.int32) for key in range(num_keys)],
        places=array("places", np.int64, 4),
        hashes=array("hashes", np.uint64),
        bands=array("bands", np.uint64, 1),
    )


def is_whole(folder: Path, unit: Unit, num_keys: int) -> bool:
    """Return whether a part is there and its tokens have their checksums."""
    part = load_part(folder, unit, num_keys)
    if part is None:
        return False
    for key, wanted in enumerate(part.report.token_crcs):
        crc = 0
        with open(token_path(folder, unit, key), "rb") as file:
            while data := file.read(1 << 20):
                crc = crc32(data, crc)
        if crc != wanted:
            return False
    return True


def remove_part(folder: Path, unit: Unit, num_keys: int) -> None:
    """Remove a part, if it is there."""
    _rest_path(folder, unit).unlink(missing_ok=True)
    for key in range(num_keys):
        token_path(folder, unit, key).unlink(missing_ok=True)


def units_of(folder: Path) -> set[Unit]:
    """Return the units of which there is a part that looks whole."""
    return {Unit(*map(int, path.stem.split("-"))) for path in folder.glob("*-*.npz")}
