"""The protocol of a sync, and the order that all of them keep.

Announce the version to the gate, have the trainer's fingerprint, change the engine's weights, have
the engine's own fingerprint, compare, and only then open the gate. Whatever goes wrong refuses the
version, and the one before if the engine may have been changed: rollouts then get the reason as an
error, never a token. K2 does the same with a checkpoint
engine beside every trainer (arXiv 2507.20534, 3.3.1); what it checks is not published.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from megatron_k2.engine.base import Engine
from megatron_k2.rl.sync.fingerprint import Fingerprint, differences, refuse_differences
from megatron_k2.rl.sync.gate import GatedEngine


class WeightSync(Protocol):
    """Brings the trainer's weights of a version into an engine."""

    async def push(self, version: int) -> Fingerprint:
        """Change the engine's weights; return the fingerprint that both sides agree on.

        Args:
            version: above the last that was agreed on; the first may be the engine's own.

        Raises:
            SyncRefused: they do not agree; names what differs. No rollout until a later push does.
            ValueError: the version is too low.
        """


class Receiver(Protocol):
    """The engine's side."""

    @property
    def engine(self) -> Engine:
        """The engine itself, behind the gate."""

    async def fingerprint(self, version: int) -> Fingerprint:
        """Return the fingerprint of what the engine has now, and claims to be ``version``."""


class Push(ABC):
    """What every sync does; subclasses say how weights travel.

    Args:
        receiver: the engine's side.
        gate: what rollouts sample from.
        tolerance_nats: of log-probabilities, see ``fingerprint.TOLERANCE_NATS``.
    """

    def __init__(self, receiver: Receiver, gate: GatedEngine, tolerance_nats: float) -> None:
        self._receiver, self._gate, self._tolerance = receiver, gate, tolerance_nats
        self._agreed: Fingerprint | None = None

    async def push(self, version: int) -> Fingerprint:
        """Change the engine's weights; see ``WeightSync``."""
        present = self._receiver.engine.weight_version
        least = present if self._agreed is None else self._agreed.version + 1
        if version < least:
            raise ValueError(f"version {version} must be {least} or more: the engine has {present}")
        self._gate.begin(version)
        touched = [version]
        try:
            trainer = await self._publish(version)
            touched.append(present)  # from here on the engine's old weights may be half gone
            await self._bring(version)
            await self._compare(trainer)
        except BaseException as error:
            for one in touched:
                self._gate.refuse(one, f"weights {version}: {error or type(error).__name__}")
            raise
        self._agreed = trainer
        self._gate.confirm(version)
        return trainer

    async def verify(self) -> None:
        """Compare again what was agreed on with what the engine has now; before a rollout, say.

        Raises:
            SyncRefused: the engine's weights are no longer those; the gate is shut.
        """
        if self._agreed is None:
            raise ValueError("nothing was pushed yet")
        try:
            await self._compare(self._agreed)
        except BaseException as error:
            version = self._agreed.version
            self._gate.refuse(version, f"weights {version}: {error or type(error).__name__}")
            raise

    @abstractmethod
    async def _publish(self, version: int) -> Fingerprint:
        """Return the trainer's fingerprint; send or write its weights if that comes first."""

    @abstractmethod
    async def _bring(self, version: int) -> None:
        """Change the engine's weights."""

    async def _compare(self, trainer: Fingerprint) -> None:
        engine = await self._receiver.fingerprint(trainer.version)
        refuse_differences(differences(trainer, engine, self._tolerance), trainer.version)
