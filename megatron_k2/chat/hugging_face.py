"""Any Hugging Face tokenizer with a chat template as a ``ChatFormat``, for trying other models.

The template is the tokenizer's own, and so is its one weakness: it renders text and then looks for
control tokens in all of it, so that a message can hold one. ``kimi.py`` cannot be misled like this.
An answer is text: tool calls and reasoning of other families are not taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from megatron_k2.chat.format import Event, Message, Parsed, TextDelta, Tools

_PROBE = "7"  # an answer of one token, to see what the template puts after it


class HuggingFaceFormat:
    """A tokenizer's own chat template.

    Attributes:
        tokenizer: of transformers, with a ``chat_template``.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer.

        Raises:
            ValueError: it has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "")
            raise ValueError(f"the tokenizer {name!r} has no chat template")
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: str) -> HuggingFaceFormat:
        """Read the tokenizer of a folder.

        Raises:
            ValueError: there is none, or it has no chat template.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no tokenizer ({error})") from error
        return cls(tokenizer)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's EOS, and the control token that the template puts after an answer."""
        dialogue = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        ids = self.encode(dialogue, add_generation_prompt=False)
        probe = self.encode_text(_PROBE)[-1]
        last = max((at for at, token in enumerate(ids) if token == probe), default=len(ids))
        controls = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        after = [token for token in ids[last + 1 :] if token in controls]
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*([] if eos is None else [eos]), *after[:1]]))

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return a dialogue as token ids.

        Raises:
            ValueError: the template does not render these messages.
        """
        import jinja2

        try:
            found = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=True,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template does not render: {error}") from error
        return list(found["input_ids"])

    def parser(self, messages: Sequence[Message], tools: Tools | None = None) -> TextParser:
        """Return a reader of the answer to these messages."""
        return TextParser(self.tokenizer, self.stop_ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, in which nothing is a control token."""
        return list(
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens by name."""
        return str(_decode(self.tokenizer, list(ids)))


class TextParser:
    """Reads an answer as text; see ``format.AnswerParser``."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        """Start before the first token."""
        self._tokenizer = tokenizer
        self._stop = set(stop_ids)
        self._ids: list[int] = []
        # Text is what the last ids add to those before them, which were said already: a decoder
        # may treat the first id of a text apart (leading spaces), and a character may need several.
        self._context = self._said = 0
        self._content: list[str] = []
        self._has_ended = False

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Return what these ids say; nothing counts after an id that ends the message."""
        for token in map(int, ids):
            self._has_ended = self._has_ended or token in self._stop
            if not self._has_ended:
                self._ids.append(token)
        return self._say(holds_back=True)

    def finish(self) -> tuple[list[Event], Parsed]:
        """Return what was held back, and the whole answer."""
        events = self._say(holds_back=False)
        return events, Parsed({"role": "assistant", "content": "".join(self._content)})

    def _say(self, holds_back: bool) -> list[Event]:
        before = _decode(self._tokenizer, self._ids[self._context : self._said])
        text = _decode(self._tokenizer, self._ids[self._context :])
        new = text[len(before) :]
        if not new or (holds_back and new.endswith("\ufffd")):
            return []
        self._context, self._said = self._said, len(self._ids)
        self._content.append(new)
        return [TextDelta(new)]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
