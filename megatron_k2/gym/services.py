"""What environments share: verifiers out of process, a sandbox, a judge.

A run makes one ``Services`` and gives it to every environment. An environment that needs what is
not there is refused when the run starts; it never gives zeros instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_k2.chat.format import Message
from megatron_k2.gym.sandbox.base import Sandbox

HOW = {
    "judge": "give a server's address: --k2-rl-judge-url in an RL run (or policy: the weights "
    "under training judge), --judge-url of the tools",
    "sandbox": "install sandlock (extra 'gym') or bubblewrap, or give an RL run the address of "
    "one, --k2-rl-sandbox-url",
    "verifiers": "the run starts them; a test passes InlineVerifiers or a VerifierPool",
}


class Judge(Protocol):
    """A model that answers questions about answers."""

    @property
    def model(self) -> str:
        """Name for the record: which model judged."""

    async def ask(self, messages: Sequence[Message], seed: int, max_tokens: int = 512) -> str:
        """Return its answer.

        Raises:
            TimeoutError: it took too long.
            RuntimeError: there is no answer; the episode gets a verdict of ``error``.
        """


class Verifiers(Protocol):
    """Runs checkers where they can be killed."""

    async def call(self, function: str, *arguments: Any, timeout_s: float = 10.0) -> Any:
        """Return ``function(*arguments)``, run in a process of its own.

        Args:
            function: ``package.module:name``; arguments and result can be pickled.
            timeout_s: of computing; neither queueing nor waiting for a processor counts.

        Raises:
            TimeoutError: it took longer; its process was killed.
            RuntimeError: it raised, or its process died; with its words.
        """


@dataclass(frozen=True)
class Services:
    """What there is for environments; None: not there."""

    verifiers: Verifiers | None = None
    sandbox: Sandbox | None = None
    judge: Judge | None = None

    def how(self, need: str) -> str:
        """Say how to get what is missing."""
        return HOW[need]
