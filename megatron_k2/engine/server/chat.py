"""/v1/chat/completions in OpenAI's words, with vLLM's token ids and reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_k2.chat.format import (
    CallArguments,
    CallBegin,
    ChatFormat,
    Event,
    ReasoningDelta,
    TextDelta,
)
from megatron_k2.chat.plain_text import PARTIAL
from megatron_k2.engine.base import Completion, Piece
from megatron_k2.engine.server.asks import Ask
from megatron_k2.engine.server.choices import Delta
from megatron_k2.engine.server.said import Choice, Head, finite, new_id, token_fields, token_name


class Chat:
    """Says assistants' messages.

    Without tools in the request, calls that the model makes all the same are left out.

    Args:
        ask: the request.
        chat_format: names tokens.
        model: the name under which the server has it.
    """

    def __init__(self, ask: Ask, chat_format: ChatFormat, model: str) -> None:
        self._ask, self._format = ask, chat_format
        kind = "chat.completion.chunk" if ask.stream else "chat.completion"
        self.head = Head(new_id("chatcmpl"), kind, model, len(ask.prompts[0]))
        self._called: set[int] = set()

    def first(self) -> list[dict[str, Any]]:
        """Return a chunk a choice, which says whose message it is."""
        delta = {"role": "assistant", "content": ""}
        return [
            self.head.say([_streamed(index, delta, None, None)], **self._prompt())
            for index in range(self._ask.num_choices)
        ]

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a step, None if it says nothing."""
        said = self._delta(delta.events)
        if "tool_calls" in said:
            self._called.add(delta.choice)
        told = self._ask.tells_tokens
        if not said and delta.finish_reason is None and not (told and delta.piece.ids):
            return None
        reason = delta.finish_reason
        if reason == "stop" and delta.choice in self._called:
            reason = "tool_calls"
        choice = _streamed(delta.choice, said, self._log_probs(delta.piece), reason)
        choice |= token_fields(delta.piece, self._ask)
        if delta.parsed is not None and delta.parsed.problems:
            choice["format_problems"] = list(delta.parsed.problems)
        return self.head.say([choice])

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        said = [self._choice(one) for one in choices]
        return self.head.say(said, usage=self.head.usage(), **self._prompt())

    def _choice(self, one: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        message |= one.parsed.message if one.parsed else {}
        calls = message.pop("tool_calls", None)
        reason = one.finish_reason
        if calls and self._ask.tools:
            message["tool_calls"] = calls
            message["content"] = message.get("content") or None
            reason = "tool_calls" if reason == "stop" else reason
        choice = {
            "index": one.index,
            "message": message,
            "logprobs": self._log_probs(one.completion),
            "finish_reason": reason,
            **token_fields(one.completion, self._ask),
        }
        if one.parsed is not None and one.parsed.problems:
            choice["format_problems"] = list(one.parsed.problems)
        return choice

    def _prompt(self) -> dict[str, Any]:
        return (
            {"prompt_token_ids": list(self._ask.prompts[0])} if self._ask.return_token_ids else {}
        )

    def _delta(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return what events add to a message."""
        content = "".join(event.text for event in events if isinstance(event, TextDelta))
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
        said: dict[str, Any] = {}
        if content:
            said["content"] = content
        if reasoning:
            said["reasoning_content"] = reasoning
        calls = [call for event in events if (call := _call(event))] if self._ask.tools else []
        if calls:
            said["tool_calls"] = calls
        return said

    def _log_probs(self, piece: Piece | Completion) -> dict[str, Any] | None:
        if not self._ask.log_probs:
            return None
        tops = piece.top if self._ask.sampling.top_log_probs else [()] * len(piece.ids)
        return {
            "content": [
                self._token(token, value)
                | {"top_logprobs": [self._token(other, its) for other, its in top]}
                for token, value, top in zip(piece.ids, piece.log_probs, tops, strict=True)
            ],
            "refusal": None,
        }

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._format.decode([token])
        return {
            "token": token_name(token, self._format, self._ask),
            "logprob": finite(log_prob),
            "bytes": None if PARTIAL in text else list(text.encode()),
        }


def _streamed(
    index: int, delta: dict[str, Any], log_probs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}


def _call(event: Event) -> dict[str, Any] | None:
    """Return what an event says of a tool call."""
    match event:
        case CallBegin(index=index, id=name_id, name=name):
            function = {"name": name, "arguments": ""}
            return {"index": index, "id": name_id, "type": "function", "function": function}
        case CallArguments(index=index, text=text):
            return {"index": index, "function": {"arguments": text}}
    return None
