"""Malformed answers: never an error, never a lost text, always a reason."""

import random
from collections.abc import Callable
from itertools import groupby

import pytest

from megatron_k2.chat.answer_parser import KimiAnswerParser
from megatron_k2.chat.format import CallArguments, CallBegin, Event, TextDelta
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.special_tokens import CONTROL_TOKENS
from tests.unit.chat.dialogues import same_message, splits
from tests.unit.chat.kimi_files import tokenizer_config, write_thinking_tokenizer, write_tokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SECTION, CALL, ARGS = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
)
END_CALL, END_SECTION, END = "<|tool_call_end|>", "<|tool_calls_section_end|>", "<|im_end|>"
GOOD = f"{CALL}functions.f:0{ARGS}{{}}{END_CALL}"
CALLED = [("functions.f:0", "f", "{}")]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], KimiFormat]:
    folder = write_thinking_tokenizer(tmp_path_factory.mktemp("release"))
    return lambda template="kimi-k2": KimiFormat.load(folder, template)


def read(format: KimiFormat, text: str, tools=TOOLS):
    """Parse a text in which names of control tokens are control tokens, token by token."""
    parser = format.parser([], tools)
    ids = format.tokenizer.encode(text, control_tokens=True)
    events = [event for token in ids for event in parser.feed([token])]
    last, parsed = parser.finish()
    assert same_message([*events, *last], parsed.message)
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in parsed.message.get("tool_calls", [])
    ]
    return parsed.message["content"] or "", calls, parsed


MALFORMED = {
    "cut in a section": (
        f"a{SECTION}",
        "a",
        [],
        ["the section of tool calls does not end: the answer stops"],
    ),
    "cut in an id": (
        f"{SECTION}{CALL}functions.ge",
        f"{CALL}functions.ge",
        [],
        ["a tool call stops inside its id 'functions.ge': the answer stops"],
    ),
    "cut in arguments": (
        f'{SECTION}{CALL}functions.f:0{ARGS}{{"a',
        "",
        [("functions.f:0", "f", '{"a')],
        ["tool call 'functions.f:0' does not end: the answer stops"],
    ),
    "ended in arguments": (
        f"{SECTION}{CALL}functions.f:0{ARGS}{{}}{END}",
        "",
        CALLED,
        [f"tool call 'functions.f:0' does not end: {END} comes"],
    ),
    "an id without a name": (
        f"{SECTION}{CALL}call_abc{ARGS}{{}}{END_CALL}{END_SECTION}{END}",
        f"{CALL}call_abc{ARGS}{{}}{END_CALL}",
        [],
        ["'call_abc' is no id of the form functions.NAME:INDEX"],
    ),
    "an id that does not count": (
        f"{SECTION}{CALL}functions.f:3{ARGS}{{}}{END_CALL}{END_SECTION}{END}",
        "",
        [("functions.f:3", "f", "{}")],
        ["id 'functions.f:3' should be 'functions.f:0', by count of calls"],
    ),
    "an undeclared tool": (
        f"{SECTION}{CALL}functions.g:0{ARGS}{{}}{END_CALL}{END_SECTION}{END}",
        "",
        [("functions.g:0", "g", "{}")],
        ["id 'functions.g:0' calls a tool that is not declared; known: f"],
    ),
    "no arguments": (
        f"{SECTION}{CALL}functions.f:0{END_CALL}{END_SECTION}{END}",
        f"{CALL}functions.f:0{END_CALL}",
        [],
        [f"a tool call stops inside its id 'functions.f:0': {END_CALL} comes"],
    ),
    "arguments that are no JSON": (
        f'{SECTION}{CALL}functions.f:0{ARGS}{{"a": }}{END_CALL}{END_SECTION}{END}',
        "",
        [("functions.f:0", "f", '{"a": }')],
        [
            "arguments of 'functions.f:0' are no JSON: Expecting value at character 6 of 7, "
            "near '{\"a\": }'"
        ],
    ),
    "arguments that are no object": (
        f"{SECTION}{CALL}functions.f:0{ARGS}[1]{END_CALL}{END_SECTION}{END}",
        "",
        [("functions.f:0", "f", "[1]")],
        ["arguments of 'functions.f:0' are no JSON object but list"],
    ),
    "a number that JSON has not": (
        f'{SECTION}{CALL}functions.f:0{ARGS}{{"a": NaN}}{END_CALL}{END_SECTION}{END}',
        "",
        [("functions.f:0", "f", '{"a": NaN}')],
        ["arguments of 'functions.f:0' are no JSON: NaN is no JSON value"],
    ),
    "arguments too deep": (
        f"{SECTION}{CALL}functions.f:0{ARGS}{'[' * 30_000}{END_CALL}{END_SECTION}{END}",
        "",
        [("functions.f:0", "f", "[" * 30_000)],
        ["arguments of 'functions.f:0' are no JSON that can be read: nested too deeply"],
    ),
    "a call outside a section": (
        f"a{GOOD}{END_SECTION}{END}",
        "a",
        CALLED,
        [f"{CALL} outside a section of tool calls"],
    ),
    "a call in a call": (
        f"{SECTION}{CALL}functions.f:0{ARGS}{{}}{CALL}functions.f:1{ARGS}{{}}{END_CALL}{END_SECTION}",
        "",
        [*CALLED, ("functions.f:1", "f", "{}")],
        [f"tool call 'functions.f:0' does not end: {CALL} comes"],
    ),
    "a section in a section": (
        f"{SECTION}{SECTION}{GOOD}{END_SECTION}{END}",
        SECTION,
        CALLED,
        [f"{SECTION} between tool calls", "text between tool calls"],
    ),
    "a second section": (
        f"{SECTION}{GOOD}{END_SECTION}{SECTION}{GOOD.replace(':0', ':1')}{END_SECTION}{END}",
        "",
        [*CALLED, ("functions.f:1", "f", "{}")],
        ["a second section of tool calls"],
    ),
    "white space between marks": (
        f"{SECTION}\n {GOOD}{END_SECTION}{END}",
        "",
        CALLED,
        [r"white space '\n ' between tool calls"],
    ),
    "marks in the wrong places": (
        f"a{END_CALL}{ARGS}b<|im_user|>{SECTION}{CALL}functions.f:0{ARGS}{{}}<|im_middle|>"
        f"{END_CALL}{END_SECTION}",
        f"a{END_CALL}{ARGS}b<|im_user|>",
        [("functions.f:0", "f", "{}<|im_middle|>")],
        [
            f"{END_CALL} in the content",
            f"{ARGS} in the content",
            "<|im_user|> in the content",
            "<|im_middle|> inside the arguments of a tool call",
            "arguments of 'functions.f:0' are no JSON: Extra data at character 2 of 15, "
            "near '{}<|im_middle|>'",
        ],
    ),
    "text after the end": (f"a{END}b[PAD]", "ab", [], ["text after the end of the message"]),
    "think marks in a format without reasoning": (
        f"<think>a</think>{END}",
        "<think>a</think>",
        [],
        ["<think> in the content", "</think> in the content"],
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers(load, name: str) -> None:
    text, content, calls, problems = MALFORMED[name]
    found = read(load(), text)
    assert found[:2] == (content, calls)
    assert list(found[2].problems) == problems


THOUGHTS = {
    "whole": (f"<think>a</think>b{END}", "a", "b", []),
    "none": (f"b{END}", None, "b", ["the answer does not begin with <think>"]),
    "a mark without its begin": (
        f"a</think>b{END}",
        None,
        "a</think>b",
        ["the answer does not begin with <think>", "</think> in the content"],
    ),
    "no end": (f"<think>a{END}", "a", "", [f"the reasoning does not end: {END} comes"]),
    "calls inside": (
        f"<think>a{SECTION}{GOOD}{END_SECTION}{END}",
        "a",
        "",
        [f"the reasoning does not end: {SECTION} comes"],
    ),
    "twice": (f"<think><think>a</think>{END}", "<think>a", "", ["<think> inside the reasoning"]),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning(load, name: str) -> None:
    text, reasoning, content, problems = THOUGHTS[name]
    found, _, parsed = read(load("kimi-k2-thinking"), text)
    assert parsed.message.get("reasoning_content") == reasoning
    assert (found, list(parsed.problems)) == (content, problems)


def test_names_of_marks_in_ordinary_tokens_are_text(load) -> None:
    format, text = load(), f"{SECTION}{GOOD}{END_SECTION}{END}"
    parser = format.parser([], TOOLS)
    events = parser.feed(format.encode_text(text))
    assert all(isinstance(event, TextDelta) for event in events)
    _, parsed = parser.finish()
    assert parsed.message == {"role": "assistant", "content": text} and parsed.problems == ()


def test_the_singular_section_marks_are_read_where_the_tokenizer_has_them(tmp_path) -> None:
    config = tokenizer_config(436)["added_tokens_decoder"]
    config |= {"465": {"content": SECTION.replace("calls", "call"), "special": False}}
    config |= {"466": {"content": END_SECTION.replace("calls", "call"), "special": False}}
    format = KimiFormat.load(write_tokenizer(tmp_path, added_tokens_decoder=config))
    text = f"{SECTION}{GOOD}{END_SECTION}".replace("calls_section", "call_section")
    assert read(format, text)[:2] == ("", CALLED)
    assert 465 in format.tokenizer.encode(text, control_tokens=True)


def test_arguments_stream_as_they_come(load) -> None:
    format = load()
    arguments = '{"city": "Zürich 😀"}'
    ids = format.tokenizer.encode(
        f"{SECTION}{CALL}functions.f:0{ARGS}{arguments}{END_CALL}{END_SECTION}", control_tokens=True
    )
    parser = format.parser([], TOOLS)
    steps: list[list[Event]] = [parser.feed([token]) for token in ids]
    begun = next(at for at, events in enumerate(steps) if events)
    assert steps[begun] == [CallBegin(0, "functions.f:0", "f")]
    pieces = [event for events in steps[begun + 1 :] for event in events]
    assert all(isinstance(piece, CallArguments) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == arguments
    assert len(pieces) > 10  # a piece a token, but for characters of several
    assert all("\ufffd" not in piece.text for piece in pieces)


def fuzz_ids(rng: random.Random, format: KimiFormat) -> list[int]:
    """Random ids, with many marks and a few that are in no vocabulary."""
    tokenizer = format.tokenizer
    marks = [tokenizer.special_id(name) for name in [*CONTROL_TOKENS, "<think>", "</think>"]]
    words = [tokenizer.encode(text) for text in ("functions.f:0", '{"a": 1}', "é你", " \n", "x")]
    ids: list[int] = []
    for _ in range(rng.randint(0, 40)):
        kind = rng.random()
        if kind < 0.5:
            ids.append(rng.choice(marks))
        elif kind < 0.8:
            ids += rng.choice(words)
        elif kind < 0.97:
            ids.append(rng.randrange(tokenizer.vocab_size))
        else:
            ids.append(rng.choice([-1, tokenizer.vocab_size, 10**9]))
    return ids


def check_fuzz(format: KimiFormat, rng: random.Random) -> None:
    ids = fuzz_ids(rng, format)
    whole, parts = (KimiAnswerParser(format.tokenizer, format.template) for _ in range(2))
    events, last = whole.feed(ids), whole.finish()
    cut = [event for part in splits(rng, ids) for event in parts.feed(part)]
    last_cut = parts.finish()
    assert last[1] == last_cut[1]  # whatever pieces it comes in
    assert same_message([*events, *last[0]], last[1].message)
    assert same_message([*cut, *last_cut[0]], last[1].message)
    text = "".join(getattr(one, "text", "") or one.id for one in [*cut, *last_cut[0]])
    runs = groupby(ids, lambda token: 0 <= token < format.tokenizer.vocab_size)
    expected = "".join(format.decode(list(run)) for is_known, run in runs if is_known)
    assert bare(format, text) == bare(format, expected), ids


def bare(format: KimiFormat, text: str) -> str:
    """A text without white space and names of control tokens."""
    for name in format.tokenizer.special_tokens:
        text = text.replace(name, "")
    return "".join(text.split())


@pytest.mark.parametrize("template", ["kimi-k2", "kimi-k2-thinking"])
def test_random_ids_lose_no_text(load, template: str) -> None:
    format, rng = load(template), random.Random(template)
    for _ in range(1_500):
        check_fuzz(format, rng)


@pytest.mark.evidence
@pytest.mark.parametrize("template", ["kimi-k2", "kimi-k2-thinking"])
def test_many_random_ids_lose_no_text(load, template: str) -> None:
    format, rng = load(template), random.Random(11)
    for _ in range(50_000):
        check_fuzz(format, rng)
