"""The token ledger: every id of an episode, in the order a model read or said it, never changed.

Token ids are the truth between engine and loss. What an engine produced is appended as produced,
with its log-probabilities and the version of the weights; what the environment, the user or a tool
says is rendered alone, between control tokens, so that it has the ids it would have in the whole
dialogue. ``ledger_check.agreement`` renders the whole dialogue and proves that.

Reasoning stays for good, as it must where nothing is rendered twice (``keep="all"``; the release
would drop it at the next question): an episode that wants the release's way begins a new ledger
there. An answer that stops without the template's end, by length or with [EOS], gets it when the
dialogue goes on, as a token that the model did not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_k2.chat.answer_parser import KimiAnswerParser
from megatron_k2.chat.call_ids import rename_calls
from megatron_k2.chat.format import Message, Parsed, Tools
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.segments import generation_prompt, message_segments
from megatron_k2.chat.template import (
    encode,
    segments,
    without_old_reasoning,
)

NO_VERSION = -1  # of tokens that no engine sampled
MAX_LOG_PROB = 1e-4  # rounding of a float32 softmax may end above 0


@dataclass
class Span:
    """Tokens ``[begin, end)`` of one turn from one writer.

    Attributes:
        writer: ``engine`` tokens are as sampled, ``template`` tokens are rendered.
        role: of the message; ``opening`` for declarations and the default system message.
        turn: place of the message in ``TokenLedger.messages``; -1 for the opening.
        problems: of the engine's answer, where it leaves the format.
    """

    writer: Literal["engine", "template"]
    role: str
    turn: int
    begin: int
    end: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingRow:
    """An episode for the loss; all lists have one entry a token.

    Attributes:
        ids: token ids.
        loss_mask: 1 where the engine sampled the token: the loss of predicting it counts.
        log_probs: of the sampled tokens, natural logarithm; 0 elsewhere.
        versions: of the weights; -1 elsewhere.
        routed_experts: chosen experts [layer][k] of the sampled tokens, empty lists elsewhere; None
            where the engine recorded none.
    """

    ids: list[int]
    loss_mask: list[int]
    log_probs: list[float]
    versions: list[int]
    routed_experts: list[list[list[int]]] | None = None


@dataclass
class TokenLedger:
    """One episode's tokens; ``begin`` makes one.

    Attributes:
        format: of the dialogue.
        tools: declarations in the opening.
        messages: of the dialogue so far, answers as they were read.
        ids, log_probs, versions, is_reasoning: an entry a token; see ``TrainingRow``.
        routed_experts: an entry a token, None until an engine gives some.
        spans: who wrote what; they follow each other without a gap.
    """

    format: KimiFormat
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    is_reasoning: list[bool] = field(default_factory=list)
    routed_experts: list[list[list[int]]] | None = None
    spans: list[Span] = field(default_factory=list)
    _parser: KimiAnswerParser | None = field(default=None, repr=False, compare=False)

    @classmethod
    def begin(
        cls, format: KimiFormat, messages: Sequence[Message], tools: Tools | None = None
    ) -> TokenLedger:
        """Begin with the messages that stand before the first answer.

        Earlier answers among them are rendered, not trained, and lose the reasoning that the
        release drops.

        Raises:
            ValueError: no messages, or messages that the format cannot say.
        """
        if not messages:
            raise ValueError("a ledger begins with one message or more: the system's or the user's")
        renamed = rename_calls(messages)
        if format.template.reasoning:
            renamed = without_old_reasoning(renamed)
        ledger = cls(format, [dict(tool) for tool in tools or ()])
        parts = segments(renamed[:1], ledger.tools, template=format.template)
        opening = [part for part in parts if part.owner.turn < 0]
        ledger._render("opening", -1, encode(format.tokenizer, opening))
        for message in renamed:
            ledger._add(message)
        return ledger

    @property
    def is_answering(self) -> bool:
        """Return whether an answer has begun and not ended."""
        return self._parser is not None

    def add(self, messages: Sequence[Message]) -> None:
        """Append what the user, a tool or the environment says.

        Raises:
            ValueError: an answer is under way; a return that answers no call, or a call that has
                none; content that is not text.
        """
        self._refuse_answering("add messages")
        given = [dict(message) for message in messages]
        rename_calls([*self.messages, *given])  # for its errors: the ids stay as the engine wrote
        self._end_message()
        for message in given:
            self._add(message)

    def begin_answer(self) -> list[int]:
        """Append the head of an answer and return the prompt of the engine: all ids so far.

        Raises:
            ValueError: an answer is under way.
        """
        self._refuse_answering("begin another")
        self._end_message()
        turn = len(self.messages)
        head = generation_prompt(turn, self.format.template)
        self._render("assistant", turn, encode(self.format.tokenizer, head))
        self.spans.append(Span("engine", "assistant", turn, len(self.ids), len(self.ids)))
        self._parser = self.format.parser(self.messages, self.tools)
        return list(self.ids)

    def extend(
        self,
        ids: Sequence[int],
        log_probs: Sequence[float],
        versions: Sequence[int],
        routed_experts: Sequence[Sequence[Sequence[int]]] = (),
    ) -> None:
        """Append what the engine produced, a piece or all of it; see ``engine.base.Piece``.

        An answer that was aborted may go on, from the ids so far, with other weights.

        Raises:
            ValueError: no answer has begun; the lists differ in length; an id is outside the
                vocabulary; a log-probability is not finite or above 0; experts are recorded for a
                part of the answer only.
        """
        if self._parser is None:
            raise ValueError("no answer has begun: call begin_answer first")
        if not len(ids) == len(log_probs) == len(versions):
            raise ValueError(
                f"{len(ids)} ids, {len(log_probs)} log-probs and {len(versions)} versions"
            )
        for at, value in enumerate(log_probs):
            if not math.isfinite(value) or value > MAX_LOG_PROB:
                raise ValueError(f"log-prob {at} of {len(ids)} is {value}: finite, 0 or less")
        size = self.format.tokenizer.vocab_size
        if outside := [token for token in ids if not 0 <= token < size]:
            raise ValueError(f"token {outside[0]} is outside the vocabulary of {size}")
        self._extend_experts(len(ids), routed_experts)
        for token in ids:
            before = self._parser.is_reasoning
            self._parser.feed((token,))
            self.is_reasoning.append(before or self._parser.is_reasoning)
        self.ids += map(int, ids)
        self.log_probs += map(float, log_probs)
        self.versions += map(int, versions)
        self.spans[-1].end = len(self.ids)

    def resume_answer(self) -> None:
        """Go on with the answer of the last span, as after a restart; see ``ledger_file``."""
        span = self.spans[-1]
        self._parser = self.format.parser(self.messages, self.tools)
        self._parser.feed(self.ids[span.begin : span.end])

    def end_answer(self) -> Parsed:
        """Read the answer, append it to the messages and return it.

        Raises:
            ValueError: no answer has begun.
        """
        if self._parser is None:
            raise ValueError("no answer has begun: call begin_answer first")
        _, parsed = self._parser.finish()
        self._parser = None
        self.spans[-1].problems = parsed.problems
        self.messages.append(parsed.message)
        return parsed

    def row(self, max_length: int | None = None, reasoning: bool = True) -> TrainingRow:
        """Return the episode for the loss.

        Args:
            max_length: cut behind this many tokens; None keeps all.
            reasoning: False takes reasoning and its marks out of the loss.
        """
        mask = [0] * len(self.ids)
        for span in self.spans:
            if span.writer == "engine":
                mask[span.begin : span.end] = [1] * (span.end - span.begin)
        if not reasoning:
            pairs = zip(mask, self.is_reasoning, strict=True)
            mask = [int(wanted and not inside) for wanted, inside in pairs]
        end = max_length
        experts = None if self.routed_experts is None else self.routed_experts[:end]
        return TrainingRow(
            self.ids[:end], mask[:end], self.log_probs[:end], self.versions[:end], experts
        )

    def _refuse_answering(self, what: str) -> None:
        if self._parser is not None:
            raise ValueError(f"cannot {what} while an answer is under way: call end_answer first")

    def _add(self, message: Mapping[str, Any]) -> None:
        turn = len(self.messages)
        parts = message_segments(message, turn, self.format.template)
        self._render(str(message["role"]), turn, encode(self.format.tokenizer, parts))
        self.messages.append(dict(message))

    def _end_message(self) -> None:
        """Append the template's end where the last answer lacks it."""
        last = self.spans[-1]
        end = self.format.tokenizer.special_id(self.format.template.end)
        if last.writer == "engine" and self.ids[-1] != end:
            self._render("assistant", last.turn, [end])

    def _render(self, role: str, turn: int, ids: list[int]) -> None:
        begin = len(self.ids)
        self.ids += ids
        self.log_probs += [0.0] * len(ids)
        self.versions += [NO_VERSION] * len(ids)
        self.is_reasoning += [False] * len(ids)
        if self.routed_experts is not None:
            self.routed_experts += [[] for _ in ids]
        self.spans.append(Span("template", role, turn, begin, len(self.ids)))

    def _extend_experts(self, count: int, given: Sequence[Sequence[Sequence[int]]]) -> None:
        said = any(span.writer == "engine" and span.begin < span.end for span in self.spans)
        records = self.routed_experts is not None or (len(given) > 0 and not said)
        if len(given) != (count if records else 0):
            raise ValueError(
                f"routed experts of {len(given)} of {count} tokens: give them for all or for none"
            )
        if records:
            if self.routed_experts is None:
                self.routed_experts = [[] for _ in self.ids]
            self.routed_experts += [[list(layer) for layer in token] for token in given]
