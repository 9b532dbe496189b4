"""Kimi's answers, token by token: reasoning, content and tool calls out of ids.

Marks are ids: a mark's name in ordinary tokens is text, so that a model that quotes one (or was
made to) calls nothing. The one exception are ``<think>`` and ``</think>`` where the tokenizer has
no ids for them. Characters come whole: bytes of a character that is split over tokens are held.

No output is an error. What leaves the format is reported, a line each, and its text is kept: as
content, or as the arguments it stands in. Only white space between the marks of a section is left
out, and reported. A call whose id has no name is content, marks included; one whose arguments are
no JSON stays a call, with the text as it is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from enum import Enum
from typing import Any

from megatron_k2.chat.answer_marks import Mark, marks_of
from megatron_k2.chat.call_reading import CallReading, quoted
from megatron_k2.chat.format import Event, Parsed, ReasoningDelta, TextDelta, Tools
from megatron_k2.chat.template_files import Template
from megatron_k2.chat.tokenizer import KimiTokenizer


class _At(Enum):
    """Where the parser stands; the value is how a problem names it."""

    START = "before the answer"
    REASONING = "inside the reasoning"
    CONTENT = "in the content"
    SECTION = "between tool calls"
    ID = "inside the id of a tool call"
    ARGUMENTS = "inside the arguments of a tool call"
    ENDED = "after the end of the message"


_IN_SECTION = (_At.SECTION, _At.ID, _At.ARGUMENTS)


class KimiAnswerParser:
    """Reads one answer; see ``format.AnswerParser``."""

    def __init__(
        self,
        tokenizer: KimiTokenizer,
        template: Template,
        num_calls: int = 0,
        tools: Tools | None = None,
    ) -> None:
        """Start before the first token of an answer.

        Args:
            tokenizer: of the ids.
            template: whose marks.
            num_calls: calls in the dialogue so far: the next has this index.
            tools: declarations; a call of another name is reported.
        """
        self._tokenizer = tokenizer
        self._marks = marks_of(tokenizer, template)
        self._think = template.reasoning or ("", "")
        self._thinks_in_text = self._think[0] not in tokenizer.special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = _At.START if template.reasoning else _At.CONTENT
        self._events: list[Event] = []
        self._problems: dict[str, None] = {}  # in order, each once
        self._content: list[str] = []
        self._thoughts: list[str] | None = None
        self._calls = CallReading(num_calls, tools, self._problem)
        self._call_mark = ""
        self._held = ""  # of an id, of white space in a section, or of what may be a mark
        self._has_section = self._section_is_empty = self._gap_speaks = False

    @property
    def is_reasoning(self) -> bool:
        """Return whether the last token stands inside the reasoning, or may begin it."""
        return self._at is _At.REASONING or (self._at is _At.START and self._held != "")

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Return what these ids say; a control token that ends the message says nothing."""
        ids = list(map(int, ids))
        first_special = self._tokenizer.num_ranks
        begin = 0
        for place, token in enumerate(ids):
            if not 0 <= token < first_special:
                self._ordinary(ids[begin:place])
                self._flush()
                self._control(token)
                begin = place + 1
        self._ordinary(ids[begin:])
        events, self._events = self._events, []
        return events

    def finish(self) -> tuple[list[Event], Parsed]:
        """Return what was held back, and the whole answer."""
        self._flush()
        self._close("the answer stops")
        self._at = _At.ENDED
        events, self._events = self._events, []
        content, calls = "".join(self._content), self._calls.message()
        message: dict[str, Any] = {"role": "assistant"}
        if self._thoughts is not None:
            message["reasoning_content"] = "".join(self._thoughts)
        message["content"] = None if calls and not content else content
        if calls:
            message["tool_calls"] = calls
        return events, Parsed(message, tuple(self._problems))

    def _ordinary(self, ids: list[int]) -> None:
        if ids and (text := self._decoder.decode(self._tokenizer.decode_bytes(ids))):
            self._text(text)

    def _flush(self) -> None:
        """Let go of the bytes of a character that does not end, as U+FFFD."""
        if text := self._decoder.decode(b"", final=True):
            self._text(text)
        self._decoder.reset()

    def _problem(self, text: str) -> None:
        self._problems.setdefault(text)

    def _say(self, text: str) -> None:
        self._content.append(text)
        self._events.append(TextDelta(text))

    def _think_aloud(self, text: str) -> None:
        if text and self._thoughts is not None:
            self._thoughts.append(text)
            self._events.append(ReasoningDelta(text))

    def _text(self, text: str) -> None:
        """Put text where the parser stands."""
        if self._at is _At.START:
            self._start(text)
        elif self._at is _At.REASONING:
            self._reason(text)
        elif self._at is _At.SECTION:
            self._between(text)
        elif self._at is _At.ID:
            self._held += text
        elif self._at is _At.ARGUMENTS and self._calls.is_open:
            self._events.append(self._calls.more(text))
        else:
            if self._at is _At.ENDED:
                self._problem(f"text {self._at.value}")
            elif self._at is _At.CONTENT and self._has_section:
                self._problem("text after the tool calls")
            self._say(text)

    def _start(self, text: str) -> None:
        """Wait for ``<think>`` in text; anything else is content."""
        text, mark = self._held + text, self._think[0]
        self._held = ""
        if self._thinks_in_text and text.startswith(mark):
            self._at, self._thoughts = _At.REASONING, []
            if rest := text[len(mark) :]:
                self._reason(rest)
        elif self._thinks_in_text and mark.startswith(text):
            self._held = text
        else:
            self._skip_reasoning()
            self._say(text)

    def _skip_reasoning(self) -> None:
        self._at = _At.CONTENT
        self._problem(f"the answer does not begin with {self._think[0]}")

    def _reason(self, text: str) -> None:
        """Pass reasoning on; in text, keep back what may become ``</think>``."""
        if not self._thinks_in_text:
            self._think_aloud(text)
            return
        text, mark = self._held + text, self._think[1]
        before, found, after = text.partition(mark)
        if found:
            self._held, self._at = "", _At.CONTENT
            self._think_aloud(before)
            if after:
                self._say(after)
            return
        kept = max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
        self._held = text[len(text) - kept :]
        self._think_aloud(text[: len(text) - kept])

    def _between(self, text: str) -> None:
        """Hold white space between marks; other text there is content, with all around it."""
        text = self._held + text
        self._gap_speaks = self._gap_speaks or not text.isspace()
        self._held = "" if self._gap_speaks else text
        if self._gap_speaks:
            self._problem(f"text {self._at.value}")
            self._say(text)

    def _gap(self) -> None:
        if self._held:
            self._problem(f"white space {quoted(self._held)} {_At.SECTION.value}")
        self._held, self._gap_speaks = "", False

    def _control(self, token: int) -> None:
        """Follow a token that is no ordinary one."""
        if not 0 <= token < self._tokenizer.vocab_size:
            self._problem(f"id {token} is outside the vocabulary of {self._tokenizer.vocab_size}")
            return
        name = self._tokenizer.token_bytes(token).decode()
        mark = self._marks.get(token)
        if mark is Mark.END or (token == self._tokenizer.pad_id and self._at is _At.ENDED):
            self._close(f"{name} comes")
            self._at = _At.ENDED
        elif mark is None or not self._follow(mark, name):
            self._problem(f"{name} {self._at.value}")
            self._text(name)

    def _follow(self, mark: Mark, name: str) -> bool:
        """Act on a mark; False where it has no place."""
        at = self._at
        if mark is Mark.THINK and at is _At.START:
            self._at, self._thoughts = _At.REASONING, []
        elif mark is Mark.END_THINK and at is _At.REASONING:
            self._at = _At.CONTENT
        elif mark is Mark.SECTION and at in (_At.START, _At.REASONING, _At.CONTENT):
            self._close(f"{name} comes")
            if self._has_section:
                self._problem("a second section of tool calls")
            self._at, self._has_section, self._section_is_empty = _At.SECTION, True, True
        elif mark is Mark.END_SECTION and at in _IN_SECTION:
            self._leave_call(name)
            self._at = _At.CONTENT
            if self._section_is_empty:
                self._problem("a section without tool calls")
        elif mark is Mark.CALL and at is not _At.ENDED:
            self._leave_call(name)
            if at not in _IN_SECTION:
                self._problem(f"{name} outside a section of tool calls")
            self._at, self._call_mark = _At.ID, name
            self._has_section, self._section_is_empty = True, False
        elif mark is Mark.ARGUMENTS and at is _At.ID:
            self._begin_arguments(name)
        elif mark is Mark.END_CALL and at in (_At.ID, _At.ARGUMENTS):
            self._end_call(name)
        else:
            return False
        return True

    def _leave_call(self, name: str) -> None:
        """Close what stands before a mark that begins a call or ends the section."""
        if self._at is _At.SECTION:
            self._gap()
        else:
            self._close(f"{name} comes")

    def _begin_arguments(self, name: str) -> None:
        begun = self._calls.begin(self._held)
        if begun is None:
            self._say(self._call_mark + self._held + name)
        else:
            self._events.append(begun)
        self._at, self._held = _At.ARGUMENTS, ""

    def _end_call(self, name: str) -> None:
        if self._at is _At.ID:
            self._close(f"{name} comes")
            self._say(name)
        elif self._calls.is_open:
            self._calls.end()
        else:
            self._say(name)
        self._at = _At.SECTION

    def _close(self, reason: str) -> None:
        """Leave what is under way, and report what is not whole."""
        held, self._held = self._held, ""
        if self._at is _At.START:
            self._skip_reasoning()
            if held:
                self._say(held)
        elif self._at is _At.REASONING:
            self._think_aloud(held)
            self._problem(f"the reasoning does not end: {reason}")
        elif self._at is _At.SECTION:
            self._held = held
            self._gap()
            self._problem(f"the section of tool calls does not end: {reason}")
        elif self._at is _At.ID:
            self._problem(f"a tool call stops inside its id {quoted(held)}: {reason}")
            self._say(self._call_mark + held)
        elif self._at is _At.ARGUMENTS and self._calls.is_open:
            self._calls.end(reason)
