"""Documents of one block: texts by key, and where each stood.

JSONL: one object a line, blank lines apart. Parquet: one row a document. Text: a file or a line a
document. A value is a string, or a list of strings that become one sequence each, as in stock
``preprocess_data.py``. Lone surrogates (legal in JSON, not in UTF-8) become U+FFFD.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_k2.data.documents import valid_unicode
from megatron_k2.data.preprocess.line_reader import LineReader
from megatron_k2.data.preprocess.optional import json_loads
from megatron_k2.data.preprocess.parquet_rows import RowGroup
from megatron_k2.data.preprocess.sources import Source

Text = str | list[str]
BOM = b"\xef\xbb\xbf"
"""Windows programs begin a UTF-8 file with it; it is no part of the first document."""
MAX_TEXT_FILE_BYTES = 1 << 30
"""A text file that is one document is held in memory some ten times over."""


@dataclass(frozen=True)
class Options:
    """How to read; what ``tools/preprocess_data.py`` was asked for."""

    json_keys: tuple[str, ...] = ("text",)
    block_bytes: int = 32 << 20
    text_documents: str = "file"
    skip_bad_records: bool = False


@dataclass
class Batch:
    """Some documents, about 1 MB.

    Attributes:
        texts: one list a key, all of one length.
        places: int64 [documents, 3]: line or row from 1 on within the block, first byte in the
            decompressed source (-1 in Parquet), number of bytes (of the line).
    """

    texts: list[list[Text]]
    places: np.ndarray


class _BadRecordError(Exception):
    """What is wrong with a record."""


class BlockReader:
    """Reads blocks; keeps the last file open, so that the next block of it costs no seek.

    Attributes, of the last block that was read to its end:
        num_lines: lines or rows in it, blank and bad ones too.
        num_bad: records that were skipped.
        disk_bytes: bytes read from the disk, about.
        is_last: the source has no block after it.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._lines: tuple[Source, LineReader] | None = None
        self._loads: Any = json_loads()
        self.num_lines = self.num_bad = self.disk_bytes = 0
        self.is_last = False

    def read(self, source: Source, block: int) -> Iterator[Batch]:
        """Yield the documents of a block in order.

        Raises:
            ValueError: a record is bad; the message names the file and the line.
        """
        self.num_lines = self.num_bad = self.disk_bytes = 0
        self.is_last = False
        if source.format == "parquet":
            yield from self._read_rows(source, block)
        elif source.format == "text" and self._options.text_documents == "file":
            yield self._read_file(source)
        else:
            yield from self._read_lines(source, block)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines[1].close()
            self._lines = None

    def _read_lines(self, source: Source, block: int) -> Iterator[Batch]:
        if self._lines is None or self._lines[0] is not source:
            self.close()
            self._lines = (source, LineReader(source))
        reader = self._lines[1]
        before = reader.disk_position
        start = block * self._options.block_bytes
        try:
            reader.seek(start)
            for place, data in reader.chunks(start + self._options.block_bytes):
                yield self._parse(source, place, data)
        except BaseException:
            self.close()
            raise
        self.is_last = reader.at_end
        self.disk_bytes = max(0, reader.disk_position - before)

    def _parse(self, source: Source, place: int, data: bytes) -> Batch:
        """Return the documents of whole lines that begin at a byte of the source."""
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        if not place and lines and lines[0].startswith(BOM):
            place, lines[0] = len(BOM), lines[0].removeprefix(BOM)
        sizes = np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)) + 1
        places = np.empty((len(lines), 3), dtype=np.int64)
        places[:, 0] = self.num_lines + 1 + np.arange(len(lines))
        places[:, 1] = place + np.cumsum(sizes) - sizes
        places[:, 2] = sizes - 1
        self.num_lines += len(lines)
        if source.format == "text":
            texts, kept = self._decode(source, lines, places)
        else:
            texts, kept = self._from_json(source, lines, places)
        return Batch(texts, places if len(kept) == len(lines) else places[kept])

    def _decode(self, source: Source, lines: list[bytes], places: np.ndarray) -> Any:
        texts: list[Text] = []
        kept = []
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                texts.append(line.removesuffix(b"\r").decode())
                kept.append(number)
            except UnicodeDecodeError as error:
                self._bad(source, places[number], f"is not UTF-8 (byte {error.start})")
        return [texts], kept

    def _from_json(self, source: Source, lines: list[bytes], places: np.ndarray) -> Any:
        keys = self._options.json_keys
        texts: list[list[Text]] = [[] for _ in keys]
        kept = []
        for number, line in enumerate(lines):
            try:
                record = self._loads(line)
                values: list[Text] = [record[key] for key in keys]
                for value in values:
                    if type(value) is not str:
                        raise TypeError
            except (ValueError, TypeError, KeyError):
                if not line.strip():
                    continue
                try:
                    values = self._slowly(line)
                except _BadRecordError as error:
                    self._bad(source, places[number], str(error))
                    continue
            for column, value in zip(texts, values, strict=True):
                column.append(value)
            kept.append(number)
        return texts, kept

    def _slowly(self, line: bytes) -> list[Text]:
        """Return a line's values by the interpreter's own parser, or say what is wrong with it.

        It takes NaN, long integers and lone surrogates, which the fast one refuses.
        """
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _BadRecordError(f"is not UTF-8 (byte {error.start})") from error
        except ValueError as error:
            raise _BadRecordError(
                f'is not JSON ({error}); it must be like {{"text": "..."}}'
            ) from error
        except RecursionError as error:
            raise _BadRecordError("is JSON of too many levels") from error
        if not isinstance(record, dict):
            raise _BadRecordError("is no JSON object")
        values = []
        for key in self._options.json_keys:
            value = checked_value(record.get(key))
            if value is None:
                there = "holds no string" if key in record else f"is not among {list(record)}"
                raise _BadRecordError(f'has no text: the field "{key}" {there} (--json-keys)')
            values.append(value)
        return values

    def _read_file(self, source: Source) -> Batch:
        reader = LineReader(source)
        pieces, size = [], 0
        try:
            for _, piece in reader.chunks(1 << 62):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_TEXT_FILE_BYTES:
                    raise ValueError(
                        f"--input {source.path}: more than {MAX_TEXT_FILE_BYTES:,} bytes as one "
                        "document; give --text-documents line"
                    )
        finally:
            reader.close()
        self.num_lines, self.disk_bytes, self.is_last = 1, source.num_bytes, True
        data = b"".join(pieces)
        text = data.removeprefix(BOM)
        place = np.array([[1, size - len(text), len(text)]], dtype=np.int64)
        try:
            return Batch([[text.decode()]], place)
        except UnicodeDecodeError as error:
            self._bad(source, place[0], f"is not UTF-8 (byte {error.start})", "the file")
            return Batch([[]], place[:0])

    def _read_rows(self, source: Source, block: int) -> Iterator[Batch]:
        rows = RowGroup(source, block, self._options.json_keys)
        for columns in rows.columns():
            yield self._from_rows(source, block, columns)
        self.is_last, self.disk_bytes = rows.is_last, rows.disk_bytes

    def _from_rows(self, source: Source, block: int, columns: list[list[Any]]) -> Batch:
        places = np.full((len(columns[0]), 3), -1, dtype=np.int64)
        places[:, 0] = self.num_lines + 1 + np.arange(len(places))
        places[:, 2] = 0
        self.num_lines += len(places)
        texts: list[list[Text]] = [[] for _ in columns]
        kept = []
        for number, row in enumerate(zip(*columns, strict=True)):
            values = [checked_value(value) for value in row]
            if None in values:
                key = self._options.json_keys[values.index(None)]
                where = f"row {places[number, 0]:,} (from 1) of row group {block} (from 0)"
                self._bad(source, places[number], f'has no text in the column "{key}"', where)
                continue
            for column, value in zip(texts, values, strict=True):
                assert value is not None
                column.append(value)
            kept.append(number)
        return Batch(texts, places[kept])

    def _bad(self, source: Source, place: np.ndarray, problem: str, where: str = "") -> None:
        """Count a bad record; ``where`` it is, if not in a line.

        Raises:
            ValueError: they are not to be skipped.
        """
        if self._options.skip_bad_records:
            self.num_bad += 1
            return
        where = where or f"line {_line_number(source, int(place[1])):,}"
        raise ValueError(
            f"--input {source.path}: {where} {problem}; --skip-bad-records leaves such out"
        )


def checked_value(value: Any) -> Text | None:
    """Return a document's value if it is a string or a list of strings, else None."""
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, list) and all(isinstance(piece, str) for piece in value):
        return [valid_unicode(piece) for piece in value]
    return None


def _line_number(source: Source, offset: int) -> int:
    """Count the line at a byte, from 1 on: read only when it is wrong."""
    reader, lines = LineReader(source), 1
    try:
        for _, piece in reader.chunks(offset):
            lines += piece.count(b"\n")
    finally:
        reader.close()
    return lines


def flat(texts: Sequence[Text]) -> tuple[list[str], np.ndarray | None]:
    """Return sentences one after the other, and how many each document has (None: one each)."""
    if all(type(text) is str for text in texts):
        return list(texts), None  # type: ignore[arg-type]
    lists = [text if isinstance(text, list) else [text] for text in texts]
    counts = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    return [sentence for sentences in lists for sentence in sentences], counts
