"""Does one unit after another: reads ahead, converts, writes behind.

Three threads share a worker: one reads the next unit's inputs, one computes, one writes the last
unit's bytes. NumPy, reads and writes release the interpreter's lock. Memory is two units' inputs
and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from megatron_k2.checkpoint.errors import CorruptSourceError
from megatron_k2.checkpoint.stream.direct_io import Buffer, File, Inputs, pages_up
from megatron_k2.checkpoint.stream.kernels import KERNELS, NUMPY
from megatron_k2.checkpoint.stream.units import PAGE_BYTES, Matrix, Part, Unit


@dataclass
class _Slot:
    """The buffers of one unit on its way."""

    inputs: list[Buffer] = field(default_factory=list)
    output: Buffer = field(default_factory=Buffer)
    writing: Future | None = None

    def input(self, index: int) -> Buffer:
        while len(self.inputs) <= index:
            self.inputs.append(Buffer())
        return self.inputs[index]


class Worker:
    """Turns units into bytes, and into files below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inputs = Inputs()
        self._outputs: dict[str, File] = {}
        self._slots = (_Slot(), _Slot())
        self._reader = ThreadPoolExecutor(1, "read")
        self._writer = ThreadPoolExecutor(1, "write")

    def close(self) -> None:
        """Finish what is under way and close all files."""
        self._reader.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self._inputs.close()
        for file in self._outputs.values():
            file.close()

    def write(self, units: Iterator[tuple[int, Unit]], done: Callable[[int, int], None]) -> None:
        """Write every unit; ``done(index, crc32)`` is called when a unit is on the disk.

        Raises:
            CorruptSourceError: an input cannot be read or converted; names tensor and file.
        """

        def store(index: int, unit: Unit, memory: memoryview) -> None:
            lead = unit.start % PAGE_BYTES
            crc = crc32(memory[lead : lead + unit.num_bytes])
            self._output(unit.path).write(unit.start, memory, unit.num_bytes)
            done(index, crc)

        for slot, index, unit, memory in self._computed(units):
            slot.writing = self._writer.submit(store, index, unit, memory)
        for slot in self._slots:
            _wait(slot)

    def produce(self, units: Iterator[tuple[int, Unit]]) -> Iterator[tuple[int, Unit, memoryview]]:
        """Yield every unit's bytes, valid until the next is asked for; nothing is written."""
        for _, index, unit, memory in self._computed(units):
            lead = unit.start % PAGE_BYTES
            yield index, unit, memory[lead : lead + unit.num_bytes]

    def _computed(
        self, units: Iterator[tuple[int, Unit]]
    ) -> Iterator[tuple[_Slot, int, Unit, memoryview]]:
        ahead: tuple[_Slot, int, Unit, Future] | None = None
        turn = 0
        while True:
            upcoming = next(units, None)
            queued = ahead
            if upcoming is not None:
                slot = self._slots[turn % 2]
                turn += 1
                # The slot's last unit was computed before; its inputs are free, its output is not.
                reading = self._reader.submit(self._read, slot, upcoming[1])
                ahead = (slot, *upcoming, reading)
            else:
                ahead = None
            if queued is not None:
                slot, index, unit, reading = queued
                inputs = reading.result()
                _wait(slot)
                yield slot, index, unit, self._convert(slot, unit, inputs)
            elif ahead is None:
                return

    def _read(self, slot: _Slot, unit: Unit) -> list[list[memoryview]]:
        place = 0
        found: list[list[memoryview]] = []
        for part in unit.parts:
            found.append([])
            for matrix in part.inputs:
                found[-1].append(self._inputs.read(matrix, slot.input(place)))
                place += 1
        return found

    def _convert(self, slot: _Slot, unit: Unit, inputs: list[list[memoryview]]) -> memoryview:
        lead = unit.start % PAGE_BYTES
        memory = slot.output.take(pages_up(lead + unit.num_bytes))
        position = 0
        for part, data in zip(unit.parts, inputs, strict=True):
            _clear(memory, lead + position, lead + part.at)
            convert(part, data, memory[lead + part.at :][: part.num_bytes])
            position = max(position, part.at + part.num_bytes)
        _clear(memory, lead + position, lead + unit.num_bytes)
        return memory

    def _output(self, path: str) -> File:
        if path not in self._outputs:
            for file in self._outputs.values():
                file.close()
            self._outputs.clear()
            self._outputs[path] = File(self.folder / path, writable=True)
        return self._outputs[path]


def convert(part: Part, data: list[memoryview], out: memoryview) -> None:
    """Run one part's kernel.

    Args:
        part: what to make.
        data: the bytes of each input.
        out: where the output goes.

    Raises:
        CorruptSourceError: the kernel refuses its input; names tensor and file.
    """
    if part.kernel == "literal":
        out[:] = part.literal
        return
    arrays = [_array(bytes_, matrix) for bytes_, matrix in zip(data, part.inputs, strict=True)]
    target = np.frombuffer(out, NUMPY[part.dtype]).reshape(part.shape)
    try:
        KERNELS[part.kernel](target, arrays, [matrix.dtype for matrix in part.inputs])
    except ValueError as error:
        source = part.inputs[0].slabs[0].path
        raise CorruptSourceError(f"{source}: {part.name}: {error}") from error


def _array(data: memoryview, matrix: Matrix) -> np.ndarray:
    return np.frombuffer(data, NUMPY[matrix.dtype]).reshape(matrix.rows, matrix.columns)


def _clear(memory: memoryview, first: int, last: int) -> None:
    if first < last:
        memory[first:last] = bytes(last - first)


def _wait(slot: _Slot) -> None:
    """Wait until a slot's output is on the disk; an error of the write is raised here."""
    if slot.writing is not None:
        slot.writing.result()
        slot.writing = None
