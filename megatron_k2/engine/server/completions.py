"""/v1/completions in OpenAI's words, with vLLM's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_k2.chat.format import ChatFormat, TextDelta
from megatron_k2.engine.base import Completion, Piece
from megatron_k2.engine.server.asks import Ask
from megatron_k2.engine.server.choices import Delta
from megatron_k2.engine.server.said import Choice, Head, finite, new_id, token_fields, token_name


class Completions:
    """Says text completions.

    Args:
        ask: the request.
        chat_format: names tokens.
        model: the name under which the server has it.
    """

    def __init__(self, ask: Ask, chat_format: ChatFormat, model: str) -> None:
        self._ask, self._format = ask, chat_format
        num_prompt_tokens = sum(map(len, ask.prompts))
        self.head = Head(new_id("cmpl"), "text_completion", model, num_prompt_tokens)
        self._begun: set[int] = set()
        self._offsets = [0] * ask.num_choices

    def first(self) -> list[dict[str, Any]]:
        """Return nothing: the first chunk of a choice has all that begins it."""
        return []

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a step, None if it says nothing."""
        text = "".join(event.text for event in delta.events if isinstance(event, TextDelta))
        told = self._ask.tells_tokens
        if not text and delta.finish_reason is None and not told:
            return None
        choice = self._said(delta.choice, text, delta.piece, delta.finish_reason)
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            choice |= self._prompt(delta.choice)
        return self.head.say([choice])

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        return self.head.say(
            [
                self._said(one.index, one.text, one.completion, one.finish_reason)
                | self._prompt(one.index)
                for one in choices
            ],
            usage=self.head.usage(),
        )

    def _said(
        self, index: int, text: str, piece: Piece | Completion, reason: str | None
    ) -> dict[str, Any]:
        log_probs = self._log_probs(index, piece) if self._ask.log_probs else None
        return {
            "index": index,
            "text": text,
            "logprobs": log_probs,
            "finish_reason": reason,
            **token_fields(piece, self._ask),
        }

    def _prompt(self, index: int) -> dict[str, Any]:
        if not self._ask.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._ask.prompts[index // self._ask.n])}

    def _log_probs(self, index: int, piece: Piece | Completion) -> dict[str, Any]:
        """Return log-probabilities as lists, one entry a token."""
        names = [token_name(token, self._format, self._ask) for token in piece.ids]
        offsets = []
        for token in piece.ids:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._format.decode([token]))
        top = [
            {token_name(token, self._format, self._ask): finite(value) for token, value in one}
            for one in piece.top
        ]
        return {
            "tokens": names,
            "token_logprobs": [finite(value) for value in piece.log_probs],
            "top_logprobs": top if self._ask.sampling.top_log_probs else None,
            "text_offset": offsets,
        }
