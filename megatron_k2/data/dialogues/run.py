"""Encodes all units, packs the dialogues, publishes the rows. Run again after a kill, it goes on.

``PREFIX.partial/`` holds the units (``units.py``) and the journal that keeps it to one process and
one job. Packing begins anew after a kill; it is the quick part. The bytes do not depend on the
number of workers. A dialogue is held out by a hash of its ids, so that copies of one are never on
both sides, and stays where it is when others are added.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_k2.data.dialogues.encode import DialogueEncoder
from megatron_k2.data.dialogues.packing import pack
from megatron_k2.data.dialogues.rows import SETS, Dialogues, publish, write_rows
from megatron_k2.data.dialogues.units import Job, Unit, is_made, make_unit, unit_path
from megatron_k2.data.preprocess.claim import named_by
from megatron_k2.data.preprocess.sequences import token_dtype
from megatron_k2.journal import CheckedLines, JournalBusy

JOURNAL = "journal.jsonl"
_worker: tuple[Path, Job, DialogueEncoder] | None = None


def run(
    job: Job,
    prefix: Path,
    workers: int = 1,
    heldout_share: float = 0.0,
    seed: int = 1234,
    packs: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Do a job.

    Args:
        job: what to encode.
        prefix: of the output files; its folder must exist.
        workers: processes.
        heldout_share: of the dialogues go to ``PREFIX_heldout``.
        seed: of the order of rows.
        packs: several dialogues in a row, not one.
        progress: show a bar on standard error.

    Returns:
        The summary that ``PREFIX.json`` holds, without the checksums.

    Raises:
        ValueError: the output is there or being written, the input is bad or gives no dialogue.
    """
    folder = prefix.with_name(prefix.name + ".partial")
    published = Path(f"{prefix}.json")
    if published.exists() and not (folder / JOURNAL).exists():
        raise ValueError(f"{published} is there; remove it, or give another --output-prefix")
    encoder = DialogueEncoder(job.options)
    vocab_size = encoder.format.tokenizer.vocab_size  # refuses a bad tokenizer before all else
    with named_by(f"--output-prefix {prefix}"):
        journal, made = _claim(folder, job)
    try:
        units = job.units()
        _encode(made, job, encoder, units, workers, progress)
        dialogues = Dialogues(made, len(units))
        if not len(dialogues.lengths):
            raise ValueError(f"--input: no dialogue is left ({dict(_notes(made, units))})")
        sets = _pack_all(folder, dialogues, job, heldout_share, seed if packs else None, progress)
        chosen = {"heldout_share": heldout_share, "seed": seed, "packed": packs}
        summary = {
            "version": 1,
            "settings": asdict(job.options) | chosen,
            "vocab_size": vocab_size,
            "notes": dict(sorted(_notes(made, units).items())),
            "sources": [{"path": s.path, "num_bytes": s.num_bytes} for s in job.sources],
            "sets": sets,
        }
        publish(folder, prefix, list(sets), summary)
    finally:
        journal.close()
    shutil.rmtree(folder, ignore_errors=True)  # a killed run's worker may still write its last unit
    return summary


def _claim(folder: Path, job: Job) -> tuple[CheckedLines, Path]:
    """Return the journal, which keeps others out, and the folder of this job's units.

    Units of another job are refused, so that no hours are lost by a wrong flag; a job that made
    none leaves nothing. A worker of a killed run may still write: into its own job's folder.
    """
    try:
        journal = CheckedLines(folder / JOURNAL)
    except JournalBusy as error:
        raise ValueError(f"--output-prefix: another process is writing {folder}") from error
    units = folder / job.fingerprint()[:16]
    others = [path for path in folder.iterdir() if path.is_dir() and path != units]
    if any(list(path.glob("*.index.npz")) for path in others):
        journal.close()
        raise ValueError(
            f"--output-prefix: {folder} holds units of a run with other input or flags; give "
            f"another prefix, or begin anew: rm -r {folder}"
        )
    for path in others:
        shutil.rmtree(path)
    units.mkdir(exist_ok=True)
    return journal, units


def _encode(
    folder: Path,
    job: Job,
    encoder: DialogueEncoder,
    units: list[Unit],
    workers: int,
    progress: bool,
) -> None:
    left = [unit for unit in units if not is_made(folder, unit.number)]
    with tqdm(
        total=len(units), initial=len(units) - len(left), desc="encode", unit="block",
        disable=not progress,
    ) as bar:  # fmt: skip
        found = 0
        for made in _made(folder, job, encoder, left, workers):
            found += made
            bar.set_postfix_str(f"{found:,} dialogues", refresh=False)
            bar.update()


def _made(
    folder: Path, job: Job, encoder: DialogueEncoder, units: list[Unit], workers: int
) -> Iterator[int]:
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield make_unit(folder, job, encoder, unit)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share locks of this process
    with context.Pool(min(workers, len(units)), _start, (folder, job)) as pool:
        yield from pool.imap_unordered(_make, units)


def _start(folder: Path, job: Job) -> None:
    global _worker
    _worker = folder, job, DialogueEncoder(job.options)


def _make(unit: Unit) -> int:
    assert _worker is not None
    return make_unit(*_worker, unit)


def _pack_all(
    folder: Path,
    dialogues: Dialogues,
    job: Job,
    heldout_share: float,
    seed: int | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Pack and write both sets; return the counts of those that are not empty."""
    learned = dialogues.learned_tokens()
    is_heldout = dialogues.hashes.astype(np.float64) / 2.0**64 < heldout_share
    found = {}
    for name, chosen in zip(SETS, (~is_heldout, is_heldout), strict=True):
        if numbers := np.flatnonzero(chosen).tolist():
            found[name] = _pack(folder, name, numbers, dialogues, learned, job, seed, progress)
    return found


def _pack(
    folder: Path, name: str, numbers: list[int], dialogues: Dialogues, learned: np.ndarray,
    job: Job, seed: int | None, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """Pack and write one set, without a seed one dialogue a row; return its counts."""
    lengths = dialogues.lengths[numbers]
    seq_length = job.options.seq_length
    rows = [[number] for number in numbers]
    if seed is not None:
        rows = [[numbers[one] for one in row] for row in pack(lengths - 1, seq_length, seed)]
    tokenizer = DialogueEncoder(job.options).format.tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    written = write_rows(folder / name, rows, dialogues, dtype)
    for _ in tqdm(written, desc=f"write {name}", total=len(rows), disable=not progress):
        pass
    places = int(lengths.sum()) - len(numbers)
    return {
        "dialogues": len(numbers),
        "copies": len(numbers) - len(np.unique(dialogues.hashes[numbers])),
        "rows": len(rows),
        "tokens": int(lengths.sum()),
        "learned_tokens": int(learned[numbers].sum()),
        "filled": places / (len(rows) * seq_length),
        "longest": int(lengths.max()),
        "median_length": float(np.median(lengths)),
    }


def _notes(folder: Path, units: list[Unit]) -> Counter[str]:
    """Return what was counted over all units."""
    total: Counter[str] = Counter()
    for unit in units:
        with np.load(unit_path(folder, unit.number, "index")) as index:
            total += Counter(json.loads(index["notes"].tobytes()))
    return total
