"""Leads a fresh environment to where a recorded episode stands, by its recorded answers.

Environments cannot be saved: they hold sandboxes, sockets, processes. They follow from task, seed
and answers instead. Each recorded answer is given again; what the environment says must be what
the ledger has, id for id, or the episode is somewhere else and cannot go on.
"""

from __future__ import annotations

from typing import Any

from megatron_k2.chat.ledger import Span, TokenLedger
from megatron_k2.gym.base import Answer, Step
from megatron_k2.rl.rollout.stage import Stage


class Elsewhere(Exception):
    """The environment does not say what it said before."""


def answer_of(ledger: TokenLedger, span: Span) -> Answer:
    """Return an ended answer as environments get it."""
    message = ledger.messages[span.turn]
    stopped = span.end > span.begin and ledger.ids[span.end - 1] in ledger.format.stop_ids
    return Answer(message.get("content") or "", message, span.problems, truncated=not stopped)


async def replay(
    recorded: TokenLedger, ledger: TokenLedger, stage: Stage
) -> tuple[TokenLedger, Step | None]:
    """Return a ledger equal to the recorded one, and the last step if it is not taken in yet.

    Args:
        recorded: with one answer or more, the last one ended or not.
        ledger: as it began, after ``stage``'s reset; is extended.
        stage: of a fresh environment.

    Raises:
        Elsewhere: the environment says something else.
        Unjudged: it fails.
    """
    spans = [span for span in recorded.spans if span.writer == "engine"]
    for at, span in enumerate(spans):
        is_last = at + 1 == len(spans)
        _same(ledger.begin_answer(), recorded.ids[: span.begin])
        ledger.extend(*_said(recorded, span))
        if is_last and recorded.is_answering:
            return ledger, None
        ledger.end_answer()
        step = await stage.step(answer_of(ledger, ledger.spans[-1]))
        if is_last and len(recorded.ids) == span.end:
            return ledger, step
        if step.terminated or step.truncated:
            raise Elsewhere
        ledger.add(step.messages)
    _same(ledger.ids, recorded.ids)
    return ledger, None


def _said(ledger: TokenLedger, span: Span) -> tuple[Any, Any, Any, Any]:
    """Return what an engine said in a span, as ``TokenLedger.extend`` takes it."""
    where = slice(span.begin, span.end)
    experts: Any = () if ledger.routed_experts is None else ledger.routed_experts[where]
    return ledger.ids[where], ledger.log_probs[where], ledger.versions[where], experts


def _same(found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise Elsewhere
