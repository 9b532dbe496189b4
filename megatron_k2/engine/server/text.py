"""Stop strings: a text as it comes ends before the first of them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_k2.chat.format import Event, TextDelta


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
