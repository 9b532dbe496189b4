"""Makes parts: reads a block, encodes its documents, writes its tokens.

``python -m megatron_k2.data.preprocess.worker FOLDER FD PARENT`` is one worker in a process of its
own. Memory: a piece of about 1 MB of text on its way, beside the tokenizer; only a document that is
larger needs more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megatron_k2.checkpoint.stream.crew import connect
from megatron_k2.data.preprocess.control_text import ControlText
from megatron_k2.data.preprocess.encoders import Encoder
from megatron_k2.data.preprocess.job import Job
from megatron_k2.data.preprocess.parts import PartWriter, Report, Unit
from megatron_k2.data.preprocess.records import Batch, BlockReader, Text, flat
from megatron_k2.data.preprocess.sequences import assemble, token_dtype

PARTS = "parts"


class PartMaker:
    """Makes the parts of a job in a folder."""

    def __init__(self, folder: Path, job: Job, encoder: Encoder) -> None:
        self._folder, self._job, self._encoder = folder / PARTS, job, encoder
        self._dtype = token_dtype(encoder.vocab_size)
        self._reader = BlockReader(job.options)
        self._control = ControlText(encoder.control_names)
        self._eod = encoder.eod if job.append_eod else None
        control = encoder.is_control
        self._first_control = 0 if control is None else int(control.argmax())

    def make(self, unit: Unit) -> Report:
        """Write the part of a unit.

        Raises:
            ValueError: the input is bad.
            RuntimeError: an engine gave ids that it must not give.
        """
        num_keys = len(self._job.options.json_keys)
        writer, report = PartWriter(self._folder, unit, num_keys, self._dtype), Report()
        reader = self._reader
        try:
            for number in self._job.groups[unit.group]:
                for batch in reader.read(self._job.sources[number], unit.block):
                    if len(batch.places):
                        self._add(writer, number, batch)
                report.num_lines += reader.num_lines
                report.num_bad += reader.num_bad
                report.disk_bytes += reader.disk_bytes
                report.is_last = reader.is_last
        except BaseException:
            writer.close()
            raise
        writer.finish(report)
        return report

    def close(self) -> None:
        """Close the input."""
        self._reader.close()

    def _add(self, writer: PartWriter, source: int, batch: Batch) -> None:
        for key, texts in enumerate(batch.texts):
            sentences, counts = flat(texts)
            if self._job.split_sentences:
                counts = self._lists_only(texts, key)
            self._control.count(sentences, writer.control_texts)
            ids, lengths = self._encoder.encode(sentences)
            self._check(ids)
            writer.add_tokens(key, *assemble(ids, lengths, counts, self._eod))
        numbers = np.full((len(batch.places), 1), source, dtype=np.int64)
        writer.add("places", np.concatenate([numbers, batch.places], axis=1))
        if self._job.dedup != "none":
            records = [_joined(values) for values in zip(*batch.texts, strict=True)]
            writer.add("hashes", _hashes(records))
            if self._job.dedup == "minhash":
                from megatron_k2.data.preprocess.minhash import bands

                writer.add("bands", np.stack([bands(record) for record in records]))

    def _lists_only(self, texts: Sequence[Text], key: int) -> np.ndarray:
        if not all(isinstance(text, list) for text in texts):
            name = self._job.options.json_keys[key]
            raise ValueError(
                f'--split-sentences: the field "{name}" of a record is one string; this tool reads '
                "sentences as a list of strings and does not find them (stock Megatron's "
                "--split-sentences writes such files, NAME_ss.jsonl)"
            )
        return np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))

    def _check(self, ids: np.ndarray) -> None:
        """Refuse control ids that came out of text, whatever the engine."""
        forbidden = self._encoder.is_control
        if forbidden is None or not len(ids) or ids.max() < self._first_control:
            return
        if forbidden[ids].any():
            token = int(ids[forbidden[ids]][0])
            raise RuntimeError(
                f"text was encoded as the control token {token}; run again with --engine reference"
            )


def _joined(values: Sequence[Text]) -> str:
    """Return a record's texts as one; no two records give the same."""
    pieces = [value if isinstance(value, str) else "\x1e".join(value) for value in values]
    return "\x1f".join(pieces)


def _hashes(records: list[str]) -> np.ndarray:
    """Return 64 bits of each text's BLAKE2b."""
    digests = b"".join(blake2b(record.encode(), digest_size=8).digest() for record in records)
    return np.frombuffer(digests, dtype="<u8")


def main(folder: str, descriptor: str, parent: str) -> None:
    """Serve the process that started this one."""
    pipe = connect(descriptor, parent)
    if pipe is None:
        return
    try:
        job = Job.load(Path(folder))
        maker = PartMaker(Path(folder), job, job.encoder())
        while True:
            pipe.send(None)
            unit = pipe.recv()
            if unit is None:
                return
            pipe.send((unit, maker.make(unit)))
    except (ValueError, OSError, RuntimeError) as error:
        pipe.send(error)
    except EOFError:  # the coordinator is gone
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
