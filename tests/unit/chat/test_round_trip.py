"""Dialogues to ids and back: nothing is lost, nothing in a text is taken for a control token."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.chat.kimi import KimiFormat
from tests.unit.chat.dialogues import as_parsed, dialogue, same_message, splits, text
from tests.unit.chat.kimi_files import tokenizer_config, write_thinking_tokenizer, write_tokenizer

TEMPLATES = ["kimi-k2", "kimi-k2-thinking"]
NUM_DIALOGUES = 1_000  # of each template; evidence has ten times as many


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], KimiFormat]:
    folder = write_thinking_tokenizer(tmp_path_factory.mktemp("release"))
    return lambda template: KimiFormat.load(folder, template)


def check_round_trip(format: KimiFormat, messages: list[dict[str, Any]], rng) -> None:
    """The prompt of the last answer begins the whole dialogue; the rest parses to the answer."""
    prompt = format.encode(messages[:-1])
    whole, owners = format.encode_owned(messages)
    assert whole[: len(prompt)] == prompt
    first = next(at for at, one in enumerate(owners) if one.turn == len(messages) - 1)
    produced = [one.is_produced for one in owners[len(prompt) :]]
    assert all(produced) and not any(one.is_produced for one in owners[first : len(prompt)])
    parser = format.parser(messages[:-1])
    events = [event for part in splits(rng, whole[len(prompt) :]) for event in parser.feed(part)]
    last, parsed = parser.finish()
    assert last == []
    assert parsed.message == as_parsed(messages[-1], bool(format.template.reasoning))
    assert parsed.problems == ()
    assert same_message(events, parsed.message)


@pytest.mark.parametrize("template", TEMPLATES)
def test_generated_dialogues_come_back(load, template: str) -> None:
    format, rng = load(template), random.Random(template)
    for _ in range(NUM_DIALOGUES):
        check_round_trip(format, dialogue(rng), rng)


@pytest.mark.evidence
@pytest.mark.parametrize("template", TEMPLATES)
def test_20_000_generated_dialogues_come_back(load, template: str) -> None:
    format, rng = load(template), random.Random(7)
    for _ in range(10 * NUM_DIALOGUES):
        check_round_trip(format, dialogue(rng), rng)


@pytest.mark.parametrize("template", TEMPLATES)
def test_arguments_of_a_megabyte_come_back(load, template: str) -> None:
    format, rng = load(template), random.Random(3)
    value = {"text": text(rng, 300_000), "rows": [[n, str(n)] for n in range(20_000)]}
    call = {"id": "functions.f:0", "type": "function"}
    call["function"] = {"name": "f", "arguments": json.dumps(value, ensure_ascii=False)}
    assert len(call["function"]["arguments"].encode("utf-8", "replace")) > 1_000_000
    answer = {"role": "assistant", "reasoning_content": "", "content": "x", "tool_calls": [call]}
    check_round_trip(format, [{"role": "user", "content": "y"}, answer], rng)


def test_reasoning_marks_in_text_come_back_where_the_tokenizer_has_no_ids(tmp_path: Path) -> None:
    format, rng = KimiFormat.load(write_tokenizer(tmp_path), "kimi-k2-thinking"), random.Random(5)
    assert "<think>" not in format.tokenizer.special_tokens
    for _ in range(200):
        messages = dialogue(rng)
        for message in messages:
            if "reasoning_content" in message:  # in text, this mark ends any reasoning
                message["reasoning_content"] = message["reasoning_content"].replace("</think>", "")
        check_round_trip(format, messages, rng)


def test_the_stand_in_names_reasoning_marks_as_later_releases_do() -> None:
    # 163606 and 163607: github.com/YS-OH-CORE/canitoolcall, docs/formats/kimi.md
    added = tokenizer_config(163_584, thinking=True)["added_tokens_decoder"]
    assert added["163606"]["content"] == "<think>" and added["163607"]["content"] == "</think>"
