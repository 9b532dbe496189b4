"""Rows of one Parquet row group, a few at a time, by pyarrow (of the extra ``data``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_k2.data.preprocess.optional import require
from megatron_k2.data.preprocess.sources import Source

ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20


class RowGroup:
    """One row group; one past the last has no rows.

    Attributes, once ``columns`` came to its end:
        is_last: no row group comes after it.
        disk_bytes: what it takes in the file, all columns.
    """

    def __init__(self, source: Source, number: int, names: Sequence[str]) -> None:
        self._source, self._number, self._names = source, number, list(names)
        self.is_last, self.disk_bytes = False, 0

    def columns(self) -> Iterator[list[list[Any]]]:
        """Yield the values of each wanted column for the next few rows.

        Raises:
            ValueError: the file is no Parquet file, damaged, or lacks a column.
        """
        path = self._source.path
        parquet = require("pyarrow.parquet", f"--input {path}")
        arrow = require("pyarrow", f"--input {path}")
        try:
            with parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
                self._look(file)
                if self._number >= file.num_row_groups:
                    return
                for rows in file.iter_batches(
                    ROWS_AT_ONCE, [self._number], columns=self._names, use_threads=False
                ):
                    yield [rows.column(name).to_pylist() for name in self._names]
        except arrow.ArrowException as error:
            raise ValueError(f"--input {path}: not readable as Parquet ({error})") from error

    def _look(self, file: Any) -> None:
        """Read what the footer tells."""
        there = file.schema_arrow.names
        for name in self._names:
            if name not in there:
                raise ValueError(
                    f"--input {self._source.path}: no column {name!r} among {there}; name it by "
                    "--json-keys"
                )
        self.is_last = self._number >= file.num_row_groups - 1
        if self._number < file.num_row_groups:
            group = file.metadata.row_group(self._number)
            sizes = (group.column(i).total_compressed_size for i in range(group.num_columns))
            self.disk_bytes = sum(sizes)
