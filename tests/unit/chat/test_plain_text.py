"""Plain text token by token: whole characters, ends, what stood before."""

from __future__ import annotations

from megatron_k2.chat.format import Event, TextDelta
from megatron_k2.chat.plain_text import MOST_HELD, PlainParser


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_a_character_is_told_once_all_of_its_bytes_are_there() -> None:
    reader = PlainParser(decode, (), list(b"caf"))
    assert [text(reader.feed([one])) for one in "é!".encode()] == ["", "é", "!"]
    assert reader.feed([0xC3]) == []
    events, parsed = reader.finish()
    assert text(events) == "\ufffd"
    assert parsed.message == {"role": "assistant", "content": "é!\ufffd"}


def test_bytes_that_are_no_character_are_not_held_for_ever() -> None:
    reader = PlainParser(decode, ())
    told = [text(reader.feed([0x80])) for _ in range(MOST_HELD)]
    assert "".join(told) == "\ufffd" * MOST_HELD


def test_nothing_counts_after_an_id_that_ends_the_message() -> None:
    reader = PlainParser(decode, (0,))
    assert text(reader.feed([*b"ab", 0, *b"cd"])) == "ab"
    assert reader.feed(list(b"ef")) == []
    assert reader.finish()[1].message["content"] == "ab"


def test_what_an_id_says_may_depend_on_those_before_it() -> None:
    def with_spaces(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    reader = PlainParser(with_spaces, (), [1])
    assert [text(reader.feed([2])), text(reader.feed([3]))] == [" 2", " 3"]
    assert text(PlainParser(with_spaces, ()).feed([2])) == "2"
