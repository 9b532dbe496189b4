"""An answer as plain text, token by token: what a format without tool calls reads.

Text is what the last ids add to those before them, which were said already: a decoder may treat the
first id of a text apart (a leading space), and a character may need several ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from megatron_k2.chat.format import Event, Parsed, TextDelta

PARTIAL = "\ufffd"  # what decoding makes of a character whose bytes are not all there
MOST_HELD = 8  # ids; a character has at most 4 bytes, so more of them are no character


class PlainParser:
    """Reads an answer as text, control tokens by name: an ``AnswerParser``.

    Args:
        decode: ids to text.
        stop_ids: ids that end the message; nothing counts after one.
        before: ids that stand before the answer; what follows may depend on them.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop_ids: Collection[int],
        before: Sequence[int] = (),
    ) -> None:
        self._decode, self._stop_ids = decode, frozenset(stop_ids)
        self._ids = list(before)  # the last that were told, and those after them
        self._told = len(self._ids)
        self._text: list[str] = []
        self._has_ended = False

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Return the text that is certain now."""
        for token in map(int, ids):
            self._has_ended = self._has_ended or token in self._stop_ids
            if not self._has_ended:
                self._ids.append(token)
        return self._tell(finished=False)

    def finish(self) -> tuple[list[Event], Parsed]:
        """Return what was held back, and the whole text as a message."""
        events = self._tell(finished=True)
        return events, Parsed({"role": "assistant", "content": "".join(self._text)})

    def _tell(self, finished: bool) -> list[Event]:
        held = len(self._ids) - self._told
        if not held:
            return []
        before = self._decode(self._ids[: self._told])
        text = self._decode(self._ids)[len(before) :]
        if not text or (text.endswith(PARTIAL) and held < MOST_HELD and not finished):
            return []
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        self._text.append(text)
        return [TextDelta(text)]
