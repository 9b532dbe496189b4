"""Text of token ids as they come: whole characters only, and none from a stop string on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_k2.chat.format import ChatFormat, Event, Parsed, TextDelta

PARTIAL = "\ufffd"  # what decoding makes of a character whose bytes are not all there
MOST_HELD = 8  # ids; a character has at most 4 bytes, so more of them are no character


class PlainParser:
    """Reads an answer as plain text, control tokens by name: an ``AnswerParser`` without messages.

    Args:
        chat_format: decodes.
        stop_ids: ids that say nothing.
    """

    def __init__(self, chat_format: ChatFormat, stop_ids: Collection[int]) -> None:
        self._format, self._stop_ids = chat_format, frozenset(stop_ids)
        self._ids: list[int] = []  # the last that were told, for what depends on neighbours
        self._told = 0
        self._text: list[str] = []

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Return the text that is certain now."""
        self._ids += (i for i in ids if i not in self._stop_ids)
        return self._tell(finished=False)

    def finish(self) -> tuple[list[Event], Parsed]:
        """Return what was held back, and the whole text as a message."""
        events = self._tell(finished=True)
        return events, Parsed({"role": "assistant", "content": "".join(self._text)})

    def _tell(self, finished: bool) -> list[Event]:
        held = len(self._ids) - self._told
        if not held:
            return []
        before = self._format.decode(self._ids[: self._told])
        text = self._format.decode(self._ids)[len(before) :]
        if not text or (text.endswith(PARTIAL) and held < MOST_HELD and not finished):
            return []
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        self._text.append(text)
        return [TextDelta(text)]


class StopStrings:
    """Ends a text before the first of some strings.

    Args:
        stops: the strings; text that may be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def cut(self, events: Sequence[Event]) -> list[Event]:
        """Return the events up to a stop string; reasoning and calls are not looked at."""
        if not self._stops:
            return list(events)
        kept: list[Event] = []
        for event in events:
            if not isinstance(event, TextDelta):
                kept += [*self.finish(), event]
                continue
            text = self._held + event.text
            places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
            self.hit = bool(places)
            end = min(places) if places else len(text) - self._beginning(text)
            self._held = "" if self.hit else text[end:]
            kept += [TextDelta(text[:end])] if end else []
            if self.hit:
                break
        return kept

    def finish(self) -> list[Event]:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return [TextDelta(held)] if held else []

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of a text with which a stop string begins."""
        most = max(map(len, self._stops)) - 1
        for size in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
