"""Published examples of tool use: to the released ids and back, in K2's own numbers."""

from pathlib import Path

import pytest

from megatron_k2.chat.kimi import KimiFormat
from tests.unit.chat.released_vocabulary import (
    IMPORTED,
    NUM_RANKS,
    RENDERED,
    write_released_tokenizer,
)

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def format(tmp_path_factory: pytest.TempPathFactory) -> KimiFormat:
    return KimiFormat.load(write_released_tokenizer(tmp_path_factory.mktemp("release")))


def message(content: str | None, calls: list[tuple[str, str]], ids: list[str]) -> dict:
    found = {"role": "assistant", "content": content or (None if calls else "")}
    if calls:
        found["tool_calls"] = [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id_, (name, arguments) in zip(ids, calls, strict=True)
        ]
    return found


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_examples_have_the_released_ids_and_come_back(format, name: str) -> None:
    content, calls, expected = RENDERED[name]
    ids = [f"functions.{tool}:{at}" for at, (tool, _) in enumerate(calls)]
    dialogue = [{"role": "user", "content": "Paris"}, message(content, calls, ids)]
    prompt = format.encode(dialogue[:1], [TOOL])
    whole = format.encode(dialogue, [TOOL], add_generation_prompt=False)
    assert whole == [*prompt, *expected, 163586]
    parser = format.parser(dialogue[:1], [TOOL])
    for token in [*expected, 163586]:
        parser.feed([token])
    _, parsed = parser.finish()
    assert parsed.message == dialogue[1] and parsed.problems == ()


@pytest.mark.parametrize("name", IMPORTED)
def test_imported_answers_are_read_and_what_is_wrong_is_named(format, name: str) -> None:
    ids, content, calls, problems = IMPORTED[name]
    parser = format.parser([])
    for token in [*ids, 163586]:
        parser.feed([token])
    _, parsed = parser.finish()
    call_ids = [call["id"] for call in parsed.message.get("tool_calls", [])]
    assert parsed.message == message(content, calls, call_ids)
    assert list(parsed.problems) == problems


def test_control_tokens_of_a_dialogue_with_tools_are_the_documented_ids(format) -> None:
    # Kimi-K2-Instruct's tokenizer_config.json; the order is that of the tool-call guide.
    system, user, assistant, middle, end = 163594, 163587, 163588, 163601, 163586
    call = ("get_weather", '{"city": "Berlin"}')
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "Paris"},
        message("", [call, call], ["functions.get_weather:0", "functions.get_weather:1"]),
        {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": "1"},
        {"role": "tool", "tool_call_id": "functions.get_weather:1", "content": "2"},
        {"role": "assistant", "content": "1"},
    ]
    ids = format.encode(messages, [TOOL])
    said = [163595, *[163597, 163598, 163599] * 2, 163596]
    assert [token for token in ids if token >= NUM_RANKS] == [
        *(system, middle, end, system, middle, end, user, middle, end),
        *(assistant, middle, *said, end, system, middle, end, system, middle, end),
        *(assistant, middle, end, assistant, middle),
    ]
    assert format.stop_ids == (163586, 163585)


def test_a_file_without_names_has_kimis_numbers(tmp_path: Path) -> None:
    tokenizer = KimiFormat.load(write_released_tokenizer(tmp_path)).tokenizer
    assert tokenizer.vocab_size == 163_840
    assert (tokenizer.eos_id, tokenizer.pad_id) == (163_585, 163_839)
