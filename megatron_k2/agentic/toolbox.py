"""What executes the tool calls of a trajectory: the simulator, or real MCP servers in a sandbox.

A toolbox is one dialogue's: it keeps that dialogue's state, and answers a call with words for the
model and an outcome for the record. A bad call, a refusal or a fault is a result, never an
exception; only a toolbox that cannot go on raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_k2.agentic.records import Outcome, Tool


@dataclass(frozen=True)
class Result:
    """What became of a call; the fields are those of ``records.Call``."""

    outcome: Outcome
    content: str
    fault: str = ""
    latency_s: float = 0.0
    before: str = ""
    after: str = ""


class ToolboxError(RuntimeError):
    """The toolbox itself failed: no fault of the policy; the trajectory is dropped."""


class Toolbox(Protocol):
    """The tools of one dialogue and the state behind them."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What may be called."""

    async def call(self, name: str, arguments: Any) -> Result:
        """Answer a call.

        Args:
            name: as the model gave it; an unknown one is ``invalid``.
            arguments: a JSON object, or JSON text of one; anything else is ``invalid``.

        Raises:
            ToolboxError: the toolbox cannot go on.
        """

    def world(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]] | None:
        """Return a copy of the records as they are; None for real servers."""

    def evidence(self) -> Mapping[str, Any]:
        """Return objective results: files, exit states; {} for a simulator."""

    async def close(self) -> None:
        """End it; called once, whatever happened."""
