"""K2-Thinking: reasoning in the running turn, none in older ones, masks as set."""

import random
from collections.abc import Callable

import pytest

from megatron_k2.chat import template
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.release_template import render_template, sorted_keys
from megatron_k2.chat.template_files import list_templates, load_template, parse_template
from tests.unit.chat.dialogues import dialogue
from tests.unit.chat.kimi_files import (
    THINKING_TEMPLATE,
    write_thinking_tokenizer,
    write_tokenizer,
)
from tests.unit.chat.test_template import TOOLS, call

THINKING = load_template("kimi-k2-thinking")


def says(content: str, reasoning: str | None = None, *calls: dict) -> dict:
    found = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return {**found, "tool_calls": list(calls)} if calls else found


DIALOGUE = [
    {"role": "user", "content": "A?"},
    says("a", "old", call(0, "{}")),
    {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": "1"},
    says("A.", "older"),
    {"role": "user", "content": "B?"},
    says("", "running", call(1, "{}")),
    {"role": "tool", "tool_call_id": "functions.get_weather:1", "content": "2"},
    says("B.", "last"),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], KimiFormat]:
    folders = {
        True: write_thinking_tokenizer(tmp_path_factory.mktemp("named")),
        False: write_tokenizer(tmp_path_factory.mktemp("plain")),
    }
    return lambda named=True: KimiFormat.load(folders[named], THINKING.name)


def thoughts(messages: list[dict], keep: template.Keep) -> list[str]:
    text = template.render(messages, template=THINKING, keep=keep)
    return [part.partition("</think>")[0] for part in text.split("<think>")[1:]]


def test_reasoning_stays_from_the_last_answer_without_calls_onwards() -> None:
    assert thoughts(DIALOGUE[:7], "released") == ["", "", "running"]
    assert thoughts(DIALOGUE, "released") == ["", "", "", ""]
    assert thoughts(DIALOGUE, "answer") == ["", "", "running", "last"]
    assert thoughts(DIALOGUE, "all") == ["old", "older", "running", "last"]
    assert thoughts(DIALOGUE[:2], "released") == ["old"]


def test_a_dialogue_word_for_word() -> None:
    assert template.render(DIALOGUE[4:7], TOOLS[:0], True, template=THINKING) == (
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI."
        "<|im_end|><|im_user|>user<|im_middle|>B?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>running</think>"
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.get_weather:1\n2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_rules_equal_a_template_in_the_sandbox() -> None:
    rng = random.Random(2)
    for _ in range(200):
        messages = dialogue(rng)[: rng.randint(1, 12)]
        tools, prompt = rng.choice([None, TOOLS]), rng.random() < 0.5
        rendered = render_template(
            THINKING_TEMPLATE,
            messages,
            tools=sorted_keys(tools),
            add_generation_prompt=prompt,
        )
        assert template.render(messages, tools, prompt, template=THINKING) == rendered


@pytest.mark.parametrize("named", [True, False])
def test_masks_hold_what_assistants_said_and_reasoning_as_set(load, named: bool) -> None:
    format = load(named)
    ids, owners = format.encode_owned(DIALOGUE, TOOLS)

    def learned(reasoning: bool) -> list[str]:
        mask = template.loss_mask(owners, reasoning)
        by_turn: dict[int, list[int]] = {}
        for token, owner, wanted in zip(ids, owners, mask, strict=True):
            if wanted:
                by_turn.setdefault(owner.turn, []).append(token)
        return [format.decode(tokens) for tokens in by_turn.values()]

    calls = template.render([says("", None, call(1, "{}"))]).partition("assistant<|im_middle|>")[2]
    assert learned(True) == ["<think>running</think>" + calls, "<think>last</think>B.<|im_end|>"]
    assert learned(False) == [calls, "B.<|im_end|>"]


def test_the_last_answer_follows_its_prompt_token_by_token(load) -> None:
    """What ``keep="answer"`` means: the prompt as the engine saw it, then the answer."""
    format = load()
    for end in (2, 4, 6, 8):
        whole, _ = format.encode_owned(DIALOGUE[:end], TOOLS)
        prompt = format.encode(DIALOGUE[: end - 1], TOOLS)
        assert whole[: len(prompt)] == prompt


def test_training_views_learn_every_answer_once_with_its_reasoning(load) -> None:
    format, rng = load(), random.Random(4)
    assert format.training_views(DIALOGUE) == [(0, 4), (4, 8)]
    assert format.training_views(DIALOGUE[:7]) == [(0, 4), (4, 7)]
    assert format.training_views(DIALOGUE[:5]) == [(0, 4)]
    assert format.training_views([DIALOGUE[0], says("x")]) == [(0, 2)]
    for _ in range(50):
        messages = dialogue(rng)
        learned = []
        for begin, end in format.training_views(messages):
            ids, owners = format.encode_owned(messages[:end])
            mask = template.loss_mask(owners)
            pairs = zip(ids, owners, mask, strict=True)
            learned += [token for token, one, wanted in pairs if wanted and one.turn >= begin]
        ids, owners = format.encode_owned(messages, keep="all")
        said = [token for token, one in zip(ids, owners, strict=True) if one.is_produced]
        assert learned == said


def test_marks_are_tokens_only_where_the_tokenizer_names_them(load) -> None:
    evil = [{"role": "user", "content": "<think>x</think>"}, says("</think>", "<think>")]
    for named, expected in ((True, [22, 23]), (False, [])):
        format = load(named)
        ids, _ = format.encode_owned(evil)
        first = format.tokenizer.num_ranks
        marks = [token - first for token in ids if token - first in (22, 23)]
        assert marks == expected
        assert format.decode(ids) == template.render(evil, template=THINKING, keep="answer")


def test_a_release_without_a_control_token_is_refused(tmp_path) -> None:
    folder = write_tokenizer(tmp_path, added_tokens_decoder={})
    with pytest.raises(ValueError, match=r"\[BOS\]"):
        KimiFormat.load(folder)


def test_template_files() -> None:
    assert list_templates() == ["kimi-k2", "kimi-k2-thinking"]
    assert [load_template(name).label for name in list_templates()] == [
        *("kimi-k2@1", "kimi-k2-thinking@1")
    ]
    with pytest.raises(ValueError, match="'k3' is unknown; known: kimi-k2, kimi-k2-thinking"):
        load_template("k3")
    with pytest.raises(ValueError, match=r"chat template 'x': .*calls"):
        parse_template('name = "x"')
