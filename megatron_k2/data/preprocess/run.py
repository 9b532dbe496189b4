"""Runs a job: hands out units, merges parts in order, publishes. Run again, it goes on.

``PREFIX.partial/`` holds the unfinished output and its journal. One worker works in this process;
more are processes of their own, and this one only merges, at the speed of a copy.
"""

from __future__ import annotations

import subprocess
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from megatron_k2.checkpoint.stream.crew import start
from megatron_k2.checkpoint.stream.journal import Journal
from megatron_k2.data.preprocess import publish, worker
from megatron_k2.data.preprocess.claim import claim
from megatron_k2.data.preprocess.encoders import Encoder
from megatron_k2.data.preprocess.job import Job
from megatron_k2.data.preprocess.merge import Merger, Totals
from megatron_k2.data.preprocess.parts import (
    Report,
    Unit,
    is_whole,
    load_part,
    remove_part,
    units_of,
)
from megatron_k2.data.preprocess.sequences import token_dtype
from megatron_k2.data.preprocess.unit_queue import UnitQueue

COMMIT_BYTES = 64 << 20
"""Tokens between two commits: each flushes the disk and ends with a line in the journal."""
MAX_UNCOMMITTED = 256
_LOG_EVERY_S = 60.0  # in a file, where the bar cannot be drawn over


def run(
    job: Job,
    encoder: Encoder,
    prefix: Path,
    workers: int,
    commit_s: float = 10.0,
    progress: bool = True,
) -> Totals:
    """Do a job.

    Args:
        job: what to do.
        encoder: the job's tokenizer, for the size of its vocabulary and its digest.
        prefix: of the output files; its folder must exist.
        workers: processes.
        commit_s: seconds between two commits; parts merged since the last are kept till then.
        progress: show a bar on standard error.

    Returns:
        What was counted.

    Raises:
        ValueError: the output is there, is being written, or the input is bad.
        RuntimeError: a worker died; the same command goes on.
    """
    folder = prefix.with_name(prefix.name + ".partial")
    if not publish.is_final(folder):
        for path in publish.outputs(prefix, job).values():
            if path.exists():
                raise ValueError(f"{path} is there; remove it, or give another --output-prefix")
    is_final = publish.is_final(folder)
    journal = claim(folder, folder / worker.PARTS, job.fingerprint(encoder), is_final)
    try:
        run_ = _Run(job, encoder, folder, journal, commit_s)
        if run_.totals.num_bad and not job.options.skip_bad_records:
            raise ValueError(
                f"--output-prefix {prefix}: {folder} was begun with --skip-bad-records, which left "
                f"out {run_.totals.num_bad:,}: give it again, or begin anew: rm -r {folder}"
            )
        if not publish.is_final(folder):
            run_.make_all(workers, prefix.name if progress else "")
            _check_filled(job, run_.totals)
            publish.finish(
                folder,
                prefix,
                job,
                token_dtype(encoder.vocab_size),
                run_.totals,
                run_.crcs,
                job.settings(encoder),
            )
        publish.rename(folder, prefix, job)
        return run_.totals
    finally:
        journal.close()


def _check_filled(job: Job, totals: Totals) -> None:
    """Refuse an output that no reader opens: upstream maps the ``.bin``, which must not be empty.

    Raises:
        ValueError: a key has no token.
    """
    empty = [k for k, n in zip(job.options.json_keys, totals.num_tokens, strict=True) if not n]
    if empty:
        files = " ".join([s.path for s in job.sources[:3]] + ["..."] * (len(job.sources) > 3))
        bad = f" ({totals.num_bad:,} bad records left out)" if totals.num_bad else ""
        cure = "; leave it out of --json-keys" if any(totals.num_tokens) else ""
        raise ValueError(
            f"--input {files}: not one token of {' and '.join(empty)} in "
            f"{totals.num_documents:,} documents{bad}, and Megatron opens no empty .bin{cure}"
        )


class _Run:
    """The state of one run."""

    def __init__(
        self, job: Job, encoder: Encoder, folder: Path, journal: Journal, commit_s: float
    ) -> None:
        self._commit_s = commit_s
        self._job, self._encoder, self._folder, self._journal = job, encoder, folder, journal
        self._parts = folder / worker.PARTS
        self._num_keys = len(job.options.json_keys)
        note = journal.note or {}
        self.totals = Totals(**note.get("totals", {"num_tokens": [0] * self._num_keys}))
        self.crcs: list[int] = note.get("crcs", [0] * self._num_keys)

    def make_all(self, workers: int, name: str) -> None:
        """Make and merge all units; show a bar under a name."""
        job = self._job
        job.save(self._folder)
        dtype = token_dtype(self._encoder.vocab_size)
        self._merger = Merger(self._folder, self._parts, dtype, self._num_keys, self._journal)
        publish.sync_folder(self._folder)
        try:
            self._prepare()
            total = sum(source.num_bytes for source in job.sources)
            with tqdm(
                total=total, unit="B", unit_scale=True, unit_divisor=1000, desc=name,
                disable=not name, mininterval=0.5 if sys.stderr.isatty() else _LOG_EVERY_S,
            ) as bar:  # fmt: skip
                self._bar, self._began, self._new_tokens = bar, time.monotonic(), 0
                self._advance()
                if workers == 1:
                    self._work_here()
                else:
                    self._work_apart(workers)
                assert self._merger.unit.group == len(job.groups), "a unit was left out"
                self._commit()
                bar.n = total
                bar.refresh()
        finally:
            self._merger.close()
        self.totals, self.crcs = self._merger.totals, self._merger.crcs

    def _prepare(self) -> None:
        """Find the parts that an earlier run left, and the first unit without one."""
        job, options, first = self._job, self._job.options, self._merger.unit
        first_sources = [job.sources[group.start] for group in job.groups]
        ends = [s.num_blocks(options.block_bytes, options.text_documents) for s in first_sources]
        self._made: dict[Unit, bool] = {}
        self._uncommitted: list[Unit] = []
        self._last_commit = time.monotonic()
        for unit in units_of(self._parts):
            if unit < first or not is_whole(self._parts, unit, self._num_keys):
                remove_part(self._parts, unit, self._num_keys)
                continue
            part = load_part(self._parts, unit, self._num_keys)
            assert part is not None
            if part.report.num_bad and not options.skip_bad_records:
                remove_part(self._parts, unit, self._num_keys)  # now one is an error
                continue
            self._made[unit] = part.report.is_last
        self._queue = UnitQueue(ends, set(self._made), first)
        for unit, is_last in self._made.items():
            self._queue.finished(unit, is_last)

    def _work_here(self) -> None:
        maker = worker.PartMaker(self._folder, self._job, self._encoder)
        try:
            while (unit := self._queue.next_for(None)) is not None:
                self._done(unit, maker.make(unit))
        finally:
            maker.close()

    def _work_apart(self, workers: int) -> None:
        module = worker.__name__
        crew = dict(start(self._folder, module) for _ in range(workers))
        try:
            while crew:
                for pipe in wait(list(crew)):
                    assert isinstance(pipe, Connection)
                    self._answer(pipe, crew)
        finally:
            for process in crew.values():
                process.kill()
            for process in crew.values():
                process.wait()

    def _answer(self, pipe: Connection, crew: dict[Connection, subprocess.Popen]) -> None:
        """Hear one message of a worker."""
        try:
            message = pipe.recv()
            if message is None:
                pipe.send(self._queue.next_for(pipe))
                return
        except (EOFError, OSError):
            status = crew.pop(pipe).wait()
            if status:
                raise RuntimeError(
                    f"a worker died (status {status}; -9 is often the kernel out of memory); what "
                    "is done is kept, run the same command again"
                ) from None
            return
        if isinstance(message, Exception):
            raise message
        self._done(*message)

    def _done(self, unit: Unit, report: Report) -> None:
        self._made[unit] = report.is_last
        self._queue.finished(unit, report.is_last)
        self._new_tokens += (
            sum(report.token_bytes) // token_dtype(self._encoder.vocab_size).itemsize
        )
        rate = self._new_tokens / max(1e-3, time.monotonic() - self._began)
        self._bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
        self._bar.update(min(report.disk_bytes, self._bar.total - self._bar.n))
        self._advance()

    def _advance(self) -> None:
        """Merge the parts that are next in order."""
        merger = self._merger
        while merger.unit in self._made:
            unit = merger.unit
            part = load_part(self._parts, unit, self._num_keys)
            if part is None:
                raise RuntimeError(f"part {unit} vanished; run the same command again")
            merger.merge(part)
            self._uncommitted.append(unit)
            del self._made[unit]
            for beyond in [u for u in self._made if unit < u < merger.unit]:
                self._uncommitted.append(beyond)  # past its source's end, and empty
                del self._made[beyond]
            if self._due():
                self._commit()

    def _due(self) -> bool:
        waiting = (
            len(self._uncommitted) >= MAX_UNCOMMITTED
            or self._merger.uncommitted_bytes >= COMMIT_BYTES
        )
        return waiting or time.monotonic() - self._last_commit >= self._commit_s

    def _commit(self) -> None:
        self._merger.commit()
        for unit in self._uncommitted:
            remove_part(self._parts, unit, self._num_keys)
        self._uncommitted.clear()
        self._last_commit = time.monotonic()
