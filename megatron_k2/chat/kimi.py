"""Kimi K2 as a ``ChatFormat``: K2-Instruct and K2-Thinking, over the tokenizer of a release.

Ids of tool calls from elsewhere are renamed before they are rendered, as Moonshot's own server
does (github.com/MoonshotAI/K2-Vendor-Verifier): foreign ids in a history mislead the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from megatron_k2.chat.answer_parser import KimiAnswerParser
from megatron_k2.chat.call_ids import num_calls, rename_calls
from megatron_k2.chat.format import Message, Tools
from megatron_k2.chat.segments import Owner, Segment
from megatron_k2.chat.template import Keep, encode, encode_owned, segments
from megatron_k2.chat.template_files import Template, load_template
from megatron_k2.chat.tokenizer import KimiTokenizer


@dataclass(frozen=True)
class KimiFormat:
    """A Kimi chat format.

    Attributes:
        tokenizer: of a release, or a stand-in.
        template: ``load_template("kimi-k2")`` or ``"kimi-k2-thinking"``.
        keep: whose reasoning prompts keep; see ``template.Keep``.
    """

    tokenizer: KimiTokenizer
    template: Template
    keep: Keep = "released"

    @classmethod
    def load(cls, path: str | Path, template: str = "kimi-k2") -> KimiFormat:
        """Read a format.

        Args:
            path: a release's folder or a rank file; see ``KimiTokenizer``.
            template: one of ``list_templates()``.

        Raises:
            ValueError: a file is wrong, there is no such template, or the tokenizer lacks one of
                its control tokens.
        """
        tokenizer, words = KimiTokenizer(path), load_template(template)
        calls = words.calls
        marks = [*words.heads.values(), words.middle, words.end, *words.stop]
        marks += [calls.section_begin[0], calls.section_end[0], calls.call_begin[0]]
        for name in [*marks, calls.arguments_begin[0], calls.call_end[0]]:
            tokenizer.special_id(name)
        return cls(tokenizer, words)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant's message."""
        return tuple(self.tokenizer.special_id(name) for name in self.template.stop)

    def segments(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        keep: Keep | None = None,
    ) -> list[Segment]:
        """Return a dialogue as segments, its call ids renamed; see ``template.segments``.

        Raises:
            ValueError: messages that the format cannot say.
        """
        return segments(
            rename_calls(messages),
            tools,
            add_generation_prompt,
            template=self.template,
            keep=keep or self.keep,
        )

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return a dialogue as token ids.

        Raises:
            ValueError: messages that the format cannot say.
        """
        return encode(self.tokenizer, self.segments(messages, tools, add_generation_prompt))

    def encode_owned(
        self, messages: Sequence[Message], tools: Tools | None = None, keep: Keep = "answer"
    ) -> tuple[list[int], list[Owner]]:
        """Return a dialogue as ids and the owner of each, for ``template.loss_mask``.

        Raises:
            ValueError: messages that the format cannot say.
        """
        return encode_owned(self.tokenizer, self.segments(messages, tools, keep=keep))

    def training_views(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Return how to learn every answer with what stood before it when it was given.

        A pair (begin, end): encode ``messages[:end]`` and learn the turns from ``begin`` on. One
        pair, (0, all), unless the format drops reasoning that these messages have.
        """
        whole = [(0, len(messages))]
        if not self.template.reasoning or not any(one.get("reasoning_content") for one in messages):
            return whole
        ends = [
            turn + 1
            for turn, one in enumerate(messages)
            if one["role"] == "assistant" and not one.get("tool_calls")
        ]
        if any(one["role"] == "assistant" for one in messages[max(ends, default=0) :]):
            ends.append(len(messages))
        return list(pairwise([0, *ends])) or whole

    def parser(self, messages: Sequence[Message], tools: Tools | None = None) -> KimiAnswerParser:
        """Return a reader of the answer to these messages."""
        return KimiAnswerParser(self.tokenizer, self.template, num_calls(messages), tools)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, in which nothing is a control token."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens by name."""
        return self.tokenizer.decode(ids)
