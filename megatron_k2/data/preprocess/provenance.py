"""Where each document came from: ``PREFIX.provenance.bin``, one record of 28 bytes a document.

Record ``i`` is of document ``i`` of the ``.idx`` files: the source's number in ``PREFIX.json``, the
line or row from 1 on, the first byte in the decompressed source and the number of bytes of the line
(of the file). Of a Parquet row only the number is known. ``PREFIX.dropped.bin`` has the duplicates
that were left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

RECORD = np.dtype([("source", "<u4"), ("line", "<i8"), ("start", "<i8"), ("num_bytes", "<i8")])


def records(places: np.ndarray, line_base: int) -> np.ndarray:
    """Return records [documents] of the documents of one block.

    Args:
        places: int64 [documents, 4], see ``parts.Part``.
        line_base: lines of the source before the block.
    """
    found = np.empty(len(places), dtype=RECORD)
    found["source"] = places[:, 0]
    found["line"] = places[:, 1] + line_base
    found["start"], found["num_bytes"] = places[:, 2], places[:, 3]
    return found


def where(prefix: str, document: int) -> dict[str, Any]:
    """Return where a document came from.

    Raises:
        ValueError: there is no such document.
    """
    summary = json.loads(Path(f"{prefix}.json").read_text())
    found = np.memmap(f"{prefix}.provenance.bin", dtype=RECORD, mode="r")
    if not 0 <= document < len(found):
        raise ValueError(f"{prefix} has the documents 0 to {len(found) - 1}, not {document}")
    record = found[document]
    answer: dict[str, Any] = {"file": summary["sources"][int(record["source"])]["path"]}
    answer["line"] = int(record["line"])
    if record["start"] >= 0:
        answer |= {"start": int(record["start"]), "num_bytes": int(record["num_bytes"])}
    return answer
