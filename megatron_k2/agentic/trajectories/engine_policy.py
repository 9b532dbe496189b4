"""The agent on an engine, by token ids: K2's template and ledger, as in reinforcement learning.

An answer is kept as the engine said it; what users and tools say is rendered once, behind it.
Nothing is rendered again, so the ledger's ids are those that the engine saw.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.model import Refused
from megatron_k2.agentic.tasks.dialogue import declarations
from megatron_k2.agentic.tasks.settings import derived_seed
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.agentic.trajectories.policies import Player, Said, Unsayable
from megatron_k2.chat.format import Message
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import TokenLedger
from megatron_k2.chat.ledger_file import to_json
from megatron_k2.engine.base import (
    Completion,
    Engine,
    EngineFull,
    Request,
    Sampling,
    generate,
)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0  # while an engine is full


@dataclass
class EnginePolicy:
    """A model on an engine.

    Attributes:
        engine: that generates.
        format: K2's, of the engine's tokenizer.
        temperature, top_p: of sampling.
        max_tokens: of one answer.
        name: of the model, for records.
        keeps_ledger: ``evidence["ledger"]`` is the ledger as one line (``chat/ledger_file.py``).
        waits: how often a full engine is asked again.
    """

    engine: Engine
    format: KimiFormat
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    name: str = "engine"
    keeps_ledger: bool = False
    waits: int = 200

    def begin(self, part: Part) -> Player:
        """Begin a dialogue; see ``Policy``."""
        try:
            ledger = TokenLedger.begin(self.format, part.messages, declarations(part.tools))
        except ValueError as error:
            raise Unsayable(str(error)) from error
        return EnginePlayer(self, part, ledger)


@dataclass
class EnginePlayer:
    """A dialogue of an ``EnginePolicy``; ``ledger`` has all its ids."""

    policy: EnginePolicy
    part: Part
    ledger: TokenLedger

    async def answer(self, heard: Sequence[Message]) -> Said:
        """Have the engine answer; see ``Player``."""
        policy, ledger = self.policy, self.ledger
        try:
            if heard:
                ledger.add(heard)
            prompt = ledger.begin_answer()
        except ValueError as error:
            raise Unsayable(str(error)) from error
        room = min(policy.max_tokens, policy.engine.max_context - len(prompt))
        is_cut = room <= 0
        if room > 0:
            sampling = Sampling(
                room,
                policy.temperature,
                policy.top_p,
                seed=derived_seed(self.part.seed, "engine", len(prompt)),
                stop_ids=policy.format.stop_ids,
            )
            name = f"{self.part.task.id}/{self.part.attempt}@{len(prompt)}"
            found = await self._generate(Request(name, tuple(prompt), sampling))
            try:
                ledger.extend(found.ids, found.log_probs, found.versions, found.routed_experts)
            except ValueError as error:
                raise Refused(f"the engine's tokens cannot be kept: {error}") from error
            is_cut = found.finish_reason != "stop"
        parsed = ledger.end_answer()
        return Said(parsed.message, parsed.problems, is_cut, len(ledger.ids), policy.name)

    def evidence(self) -> Mapping[str, Any]:
        """Return the weights' versions that spoke, and the ledger where it is kept."""
        versions = sorted({one for one in self.ledger.versions if one >= 0})
        kept = {"ledger": to_json(self.ledger)} if self.policy.keeps_ledger else {}
        return {"weight_versions": versions, **kept}

    async def _generate(self, request: Request) -> Completion:
        wait_s = FIRST_WAIT_S
        for _ in range(self.policy.waits):
            try:
                return await generate(self.policy.engine, request)
            except EngineFull:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            except ValueError as error:
                raise Refused(f"the engine refuses the prompt: {error}") from error
        raise Refused(f"the engine was full {self.policy.waits} times")
