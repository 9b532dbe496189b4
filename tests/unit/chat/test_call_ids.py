"""Ids of tool calls: the documented form, renaming of foreign ones, refusals."""

import pytest

from megatron_k2.chat.call_ids import parse_id, read_id, rename_calls


def asks(*calls: tuple[str | None, str]) -> dict:
    made = [{"id": id_, "function": {"name": name, "arguments": "{}"}} for id_, name in calls]
    return {"role": "assistant", "content": None, "tool_calls": made}


def returns(id_: str | None, content: str = "") -> dict:
    return {"role": "tool", "tool_call_id": id_, "content": content}


USER = {"role": "user", "content": "x"}


def ids(messages: list[dict]) -> list[str]:
    found = []
    for message in messages:
        found += [call["id"] for call in message.get("tool_calls", [])]
        found += [message["tool_call_id"]] if "tool_call_id" in message else []
    return found


def test_foreign_ids_are_renamed_with_their_returns_over_the_whole_dialogue() -> None:
    messages = [
        USER,
        asks(("call_1", "f"), ("call_2", "g")),
        returns("call_2"),
        returns("call_1"),
        asks(("search:0", "search")),
        returns("search:0"),
    ]
    assert ids(rename_calls(messages)) == [
        *("functions.f:0", "functions.g:1", "functions.g:1", "functions.f:0"),
        *("functions.search:2", "functions.search:2"),
    ]
    assert ids(messages)[0] == "call_1"  # the input stays


def test_right_ids_stay() -> None:
    messages = [USER, asks(("functions.f:0", "f")), returns("functions.f:0"), asks((None, "g"))]
    assert rename_calls(messages[:3]) == messages[:3]
    assert ids(rename_calls(messages))[-1] == "functions.g:1"


def test_an_id_may_be_used_again_and_may_be_missing() -> None:
    messages = [USER, asks(("a", "f"), ("a", "f")), returns("a"), returns("a"), asks((None, "f"))]
    messages += [returns(None), asks(("a", "f")), returns("a")]
    new = [f"functions.f:{n}" for n in (0, 1, 0, 1, 2, 2, 3, 3)]
    assert ids(rename_calls(messages)) == new


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (
            [USER, asks(("a", "f")), returns("b")],
            "message 2: returns call 'b', which no message before it makes (last calls: 'a')",
        ),
        ([USER, returns("b")], "message 1: returns call 'b', which .* (last calls: none)"),
        (
            [USER, asks(("a", "f")), returns("a"), returns("a")],
            "message 3: call 'a' has its return already",
        ),
        (
            [USER, asks(("a", "f"), ("b", "f")), returns("b"), USER],
            "message 3 (user) comes before the return of 'a'",
        ),
        ([USER, {**asks(("a", "f")), "role": "user"}], "message 1: a user message has tool_calls"),
        ([USER, asks(("a", ""))], "message 1: a tool call needs function.name, not"),
        ([{"content": "x"}], "message 0: a role is needed; this is"),
        ([USER, {"role": "assistant", "tool_calls": {"a": 1}}], "message 1: tool_calls must be a"),
        ([{**USER, "name": 3}], "message 0: name must be a text, not 3"),
    ],
)
def test_what_dangles_is_refused(messages: list[dict], error: str) -> None:
    with pytest.raises(ValueError) as raised:
        rename_calls(messages)
    start, _, end = error.partition(".*")
    assert str(raised.value).startswith(start) and end.strip() in str(raised.value)


def test_forms_of_ids() -> None:
    assert parse_id("functions.get_weather:12") == ("get_weather", 12)
    assert parse_id("functions.a.b:c:0") == ("a.b:c", 0)
    assert read_id("search:0") == ("search", 0)
    for wrong in ("", "f", "functions.:0", "functions.f:", "functions.f:-1", "functions.f:٣"):
        assert parse_id(wrong) is None
    assert read_id("functions.f:" + "9" * 5_000) is None  # more than int() would read
