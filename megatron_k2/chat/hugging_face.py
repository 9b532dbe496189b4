"""Any Hugging Face tokenizer with a chat template as a ``ChatFormat``, for trying other models.

The template is the tokenizer's own, and so is its one weakness: it renders text and then looks for
control tokens in all of it, so that a message can hold one. ``kimi.py`` cannot be misled like this.
An answer is text: tool calls and reasoning of other families are not taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from megatron_k2.chat.format import Message, Tools
from megatron_k2.chat.plain_text import PlainParser

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

    def parser(self, messages: Sequence[Message], tools: Tools | None = None) -> PlainParser:
        """Return a reader of the answer to these messages."""
        return PlainParser(self.decode, self.stop_ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, in which nothing is a control token."""
        return list(
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens by name."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)
