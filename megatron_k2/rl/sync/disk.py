"""Sync by disk: between processes, layouts and machines that share a file system.

The trainer writes a version (disk_writer.py), the engine's process reads it (disk_reader.py). With
a writer both are one process; without, the version is there already, and the trainer's fingerprint
in its folder is what the engine is held to.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Protocol

from megatron_k2.engine.base import Engine
from megatron_k2.rl.sync.base import Push
from megatron_k2.rl.sync.disk_reader import check, load_into_
from megatron_k2.rl.sync.disk_writer import DiskWriter
from megatron_k2.rl.sync.fingerprint import TOLERANCE_NATS, Fingerprint
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.local import LocalReceiver
from megatron_k2.rl.sync.probe import trainer_top
from megatron_k2.rl.sync.versions import version_folder


class FolderReceiver(Protocol):
    """An engine that can take its weights from a folder."""

    @property
    def engine(self) -> Engine:
        """The engine itself."""

    async def take(self, version: int, folder: Path) -> None:
        """Load a checked version."""

    async def fingerprint(self, version: int) -> Fingerprint:
        """See ``Receiver``."""


class LocalFolderReceiver(LocalReceiver):
    """A ``LocalEngine`` whose model, of any layout, is filled from folders."""

    async def take(self, version: int, folder: Path) -> None:
        """Load a checked version between two steps."""
        chunks: list[Any] = list(self.weights.chunks)
        await self.change(version, lambda: load_into_(chunks, folder))


class DiskSync(Push):
    """``WeightSync`` through a folder of versions.

    Args:
        folder: of the versions.
        receiver: the engine's side; its weights are compared in the dtype that was written.
        gate: what rollouts sample from.
        dtype: BF16 or F32, as written; decides the tolerance.
        writer: the trainer's side, where it is this process.
        tolerance_nats: None takes that of the dtype.
    """

    def __init__(
        self,
        folder: Path,
        receiver: FolderReceiver,
        gate: GatedEngine,
        dtype: str,
        writer: DiskWriter | None = None,
        tolerance_nats: float | None = None,
    ) -> None:
        allowed = TOLERANCE_NATS[dtype] if tolerance_nats is None else tolerance_nats
        super().__init__(receiver, gate, allowed)
        self._folder, self._taker, self._writer = folder, receiver, writer

    async def _publish(self, version: int) -> Fingerprint:
        if self._writer is not None:
            await asyncio.to_thread(write_version, self._writer, version)
        return await asyncio.to_thread(check, version_folder(self._folder, version), version)

    async def _bring(self, version: int) -> None:
        await self._taker.take(version, version_folder(self._folder, version))


def write_version(writer: DiskWriter, version: int) -> Fingerprint:
    """Write a version of a trainer whose chunk has all layers; see ``DiskWriter.write``."""
    weights = writer.weights
    return writer.write(version, trainer_top(weights.chunks[0], weights.shape.vocab_size))
