"""The token ledger: appended, never rendered again, and proven to agree with the template."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import TokenLedger
from megatron_k2.chat.ledger_check import agreement
from megatron_k2.chat.ledger_file import from_json, to_json
from tests.unit.chat.dialogues import NAMES, as_parsed, dialogue, splits, text
from tests.unit.chat.kimi_files import write_thinking_tokenizer, write_tokenizer
from tests.unit.chat.test_template import TOOLS

USER = {"role": "user", "content": "Wie ist das Wetter?"}
CALL = (
    "Ich schaue.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "Zürich"}<|tool_call_end|><|tool_calls_section_end|>'
)
RETURN = {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": "Sonne 😀"}

DECLARED = [{"type": "function", "function": {"name": name}} for name in NAMES]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], KimiFormat]:
    folder = write_thinking_tokenizer(tmp_path_factory.mktemp("release"))
    return lambda template="kimi-k2": KimiFormat.load(folder, template)


def answer(ledger: TokenLedger, ids: list[int], version: int = 0, **more: Any):
    """Let an engine say these ids."""
    ledger.begin_answer()
    ledger.extend(ids, [-0.5] * len(ids), [version] * len(ids), **more)
    return ledger.end_answer()


def spoken(format: KimiFormat, said: str) -> list[int]:
    return format.tokenizer.encode(said, control_tokens=True)


def bytewise(format: KimiFormat, ids: list[int]) -> list[int]:
    """The same bytes in other tokens: ordinary ones one byte each."""
    tokenizer = format.tokenizer
    found = []
    for token in ids:
        if token >= tokenizer.num_ranks:
            found.append(token)
        else:
            found += [tokenizer._ranks[bytes([byte])] for byte in tokenizer.token_bytes(token)]
    return found


def test_an_episode_agrees_and_its_mask_is_what_the_engine_said(load) -> None:
    format = load()
    ledger = TokenLedger.begin(format, [USER], TOOLS)
    assert ledger.begin_answer() == format.encode([USER], TOOLS)
    first = spoken(format, CALL + "<|im_end|>")
    ledger.extend(first, [-0.5] * len(first), [3] * len(first))
    assert ledger.end_answer().problems == ()
    ledger.add([RETURN])
    assert ledger.begin_answer() == format.encode(ledger.messages, TOOLS)
    second = spoken(format, "Sonne.<|im_end|>")
    ledger.extend(second[:1], [-1.0], [3])
    ledger.extend(second[1:], [-2.0] * len(second[1:]), [4] * len(second[1:]))  # new weights
    ledger.end_answer()
    assert ledger.ids == format.encode(ledger.messages, TOOLS, add_generation_prompt=False)
    row = ledger.row()
    assert [i for i, m in zip(row.ids, row.loss_mask, strict=True) if m] == first + second
    assert [v for v in row.versions if v >= 0] == [3] * (len(first) + 1) + [4] * (len(second) - 1)
    assert [p for p in row.log_probs if p][-2:] == [-2.0, -2.0]
    found = agreement(ledger)
    assert found.num_rendered + found.num_engine == len(ledger.ids)
    assert (found.num_recut, found.malformed_turns) == (0, ())
    assert len(ledger.row(max_length=7).ids) == len(ledger.row(max_length=7).loss_mask) == 7


def test_other_tokens_of_the_same_text_are_kept_and_agree(load) -> None:
    format = load()
    ledger = TokenLedger.begin(format, [USER], TOOLS)
    canonical = spoken(format, CALL + "<|im_end|>")
    ids = bytewise(format, canonical)
    assert ids != canonical
    answer(ledger, ids)
    ledger.add([RETURN])
    answer(ledger, spoken(format, "ok<|im_end|>"))
    assert agreement(ledger).num_recut == len(ids)
    row = ledger.row()
    assert [i for i, m in zip(row.ids, row.loss_mask, strict=True) if m][: len(ids)] == ids


@pytest.mark.parametrize("said", ["Sonne", "Sonne[EOS]", "", "[EOS]"])
def test_an_answer_without_the_templates_end_gets_it_when_the_dialogue_goes_on(load, said) -> None:
    """Cut by length, or ended with [EOS]: the end that follows is not learned."""
    format = load()
    ledger = TokenLedger.begin(format, [USER])
    ids = spoken(format, said)
    parsed = answer(ledger, ids)
    assert parsed.message["content"] == said.removesuffix("[EOS]") and parsed.problems == ()
    assert agreement(ledger).num_engine == len(ids)
    ledger.add([USER])
    prompt = ledger.begin_answer()
    head = format.encode([USER])
    tail = format.encode([{"role": "system", "content": ""}, USER])
    end = format.tokenizer.special_id("<|im_end|>")
    assert prompt[: len(head) + len(ids) + 1] == [*head, *ids, end]
    assert prompt[len(head) + len(ids) + 1 :] == tail[tail.index(end) + 1 :]
    ledger.end_answer()
    assert sum(ledger.row().loss_mask) == len(ids)
    agreement(ledger)


def test_reasoning_is_kept_and_masked_as_set(load) -> None:
    format = load("kimi-k2-thinking")
    old = {"role": "assistant", "content": "alt", "reasoning_content": "nicht mehr"}
    ledger = TokenLedger.begin(format, [USER, old, USER])
    assert ledger.begin_answer() == format.encode([USER, old, USER])
    ids = spoken(format, "<think>hm</think>ja<|im_end|>")
    ledger.extend(ids, [-1.0] * len(ids), [0] * len(ids))
    ledger.end_answer()
    ledger.add([USER])  # here the release would drop the reasoning
    assert "<think>hm</think>ja" in format.decode(ledger.begin_answer())
    ledger.end_answer()
    agreement(ledger)
    with_, without = (ledger.row(reasoning=flag) for flag in (True, False))
    learned = [i for i, m in zip(without.ids, without.loss_mask, strict=True) if m]
    assert sum(with_.loss_mask) == len(ids)
    assert format.decode(learned) == "ja<|im_end|>"


def test_malformed_answers_go_on_and_are_named(load) -> None:
    format = load()
    ledger = TokenLedger.begin(format, [USER], TOOLS)
    parsed = answer(ledger, spoken(format, "<|tool_calls_section_begin|>x<|im_end|>"))
    assert parsed.problems
    ledger.add([USER])
    answer(ledger, spoken(format, "ok<|im_end|>"))
    assert agreement(ledger).malformed_turns == (1,)
    assert ledger.spans[3].problems == parsed.problems


def test_the_first_divergence_is_named_with_what_stands_around_it(load) -> None:
    format = load()
    ledger = TokenLedger.begin(format, [USER], TOOLS)
    answer(ledger, spoken(format, CALL + "<|im_end|>"))
    ledger.add([RETURN])
    whole = to_json(ledger)
    begin = ledger.spans[-1].begin
    ledger.ids[begin + 4] = 7
    with pytest.raises(
        ValueError, match=rf"in turn 2 \(tool\) at token {begin + 4}: the ledger ha"
    ):
        agreement(ledger)
    ledger = from_json(format, whole)
    ledger.messages[1]["content"] = "Ich schau."
    with pytest.raises(ValueError, match=r"turn 1 .*the engine said 'Ich schaue.<\|.*'Ich schau."):
        agreement(ledger)
    ledger = from_json(format, whole)
    ledger.messages[1]["tool_calls"][0]["function"]["arguments"] = "{}"
    with pytest.raises(ValueError, match=r"turn 1 \(assistant\), in the text from token \d+"):
        agreement(ledger)


def test_a_missing_message_and_a_missing_end_are_found(load) -> None:
    format = load()
    ledger = TokenLedger.begin(format, [USER])
    answer(ledger, spoken(format, "a"))
    ledger.add([USER])
    whole = to_json(ledger)
    ledger.messages.append({"role": "assistant", "content": "b"})
    with pytest.raises(ValueError, match=r"has the turns \[-1, 0, 1, 2\], the dialogue 4 messages"):
        agreement(ledger)
    table = json.loads(whole)
    end = table["spans"].pop(4)["begin"]
    assert table["ids"][end] == format.tokenizer.special_id("<|im_end|>")
    for key in ("ids", "log_probs", "versions", "is_reasoning"):
        del table[key][end]
    for key in ("begin", "end"):
        table["spans"][4][key] -= 1
    with pytest.raises(ValueError, match="turn 1 of the ledger does not end"):
        agreement(from_json(format, json.dumps(table)))


def test_an_answer_under_way_goes_on_after_a_restart(load) -> None:
    format = load()
    ids = spoken(format, CALL + "<|im_end|>")
    for cut in range(0, len(ids) + 1, 5):
        ledger = TokenLedger.begin(format, [USER], TOOLS)
        ledger.begin_answer()
        ledger.extend(ids[:cut], [-1.0] * cut, [0] * cut)
        ledger = from_json(format, to_json(ledger))
        agreement(ledger)
        rest = ids[cut:]
        ledger.extend(rest, [-1.0] * len(rest), [1] * len(rest))
        parsed = ledger.end_answer()
        assert parsed.problems == () and parsed.message["content"] == "Ich schaue."
        assert agreement(ledger).num_engine == len(ids)


def episode(format: KimiFormat, rng: random.Random) -> TokenLedger:
    """A random dialogue spoken by an engine that cuts text, stops and ends as it likes."""
    messages = dialogue(rng)
    first = next(at for at, one in enumerate(messages) if one["role"] == "assistant")
    ledger = TokenLedger.begin(format, messages[:first], DECLARED if rng.random() < 0.5 else None)
    for message in messages[first:]:
        before = list(ledger.ids)
        if message["role"] != "assistant":
            ledger.add([message])
        else:
            head = len(ledger.begin_answer())
            whole, owners = format.encode_owned([*ledger.messages, message], keep="all")
            ids = [
                token
                for token, one in zip(whole, owners, strict=True)
                if one.turn == len(ledger.messages) and one.is_produced
            ]
            if rng.random() < 0.5:
                ids = bytewise(format, ids)
            if not message.get("tool_calls") and rng.random() < 0.3:
                ids = [*ids[:-1], *([format.tokenizer.eos_id] if rng.random() < 0.5 else [])]
            for part in splits(rng, ids):
                experts = [[[rng.randrange(4)]] for _ in part]
                ledger.extend(part, [-rng.random()] * len(part), [2] * len(part), experts)
            parsed = ledger.end_answer()
            assert parsed.problems == ()
            assert parsed.message == as_parsed(message, bool(format.template.reasoning))
            assert ledger.ids[head:] == ids
        assert ledger.ids[: len(before)] == before
    return ledger


@pytest.mark.parametrize("template", ["kimi-k2", "kimi-k2-thinking"])
def test_random_episodes_agree_and_come_back_from_json(load, template: str) -> None:
    format, rng = load(template), random.Random(template)
    for _ in range(40):
        ledger = episode(format, rng)
        agreement(ledger)
        line = to_json(ledger)
        assert "\n" not in line
        again = from_json(format, line)
        assert (
            to_json(again) == line and again.row() == ledger.row() and again.spans == ledger.spans
        )
        row = ledger.row()
        assert sum(row.loss_mask) == sum(version == 2 for version in row.versions)
        assert all(bool(e) == bool(m) for e, m in zip(row.routed_experts, row.loss_mask))  # noqa: B905
        at = rng.choice([i for i, wanted in enumerate(row.loss_mask) if not wanted])
        ledger.ids[at] = (ledger.ids[at] + 1) % format.tokenizer.vocab_size
        with pytest.raises(ValueError, match="ledger and template differ"):
            agreement(ledger)


def test_what_does_not_fit_is_refused(load, tmp_path) -> None:
    format = load()
    with pytest.raises(ValueError, match="begins with one message"):
        TokenLedger.begin(format, [])
    ledger = TokenLedger.begin(format, [USER])
    with pytest.raises(ValueError, match="no answer has begun"):
        ledger.extend([1], [-1.0], [0])
    with pytest.raises(ValueError, match=r"message 1: returns call .functions\.get_weather:0"):
        ledger.add([RETURN])
    ledger.begin_answer()
    for wrong, error in [
        (([1, 2], [-1.0], [0]), "2 ids, 1 log-probs and 1 versions"),
        (([1], [float("nan")], [0]), "log-prob 0 of 1 is nan"),
        (([1], [0.5], [0]), "log-prob 0 of 1 is 0.5"),
    ]:
        with pytest.raises(ValueError, match=error):
            ledger.extend(*wrong)
    ledger.extend([1], [-1.0], [0])
    with pytest.raises(ValueError, match="routed experts of 1 of 1 tokens: give them for all or"):
        ledger.extend([1], [-1.0], [0], [[[0]]])
    for forbidden in (lambda: ledger.add([USER]), ledger.begin_answer):
        with pytest.raises(ValueError, match="while an answer is under way: call end_answer"):
            forbidden()
    ledger.end_answer()
    line = to_json(ledger)
    other = KimiFormat.load(write_tokenizer(tmp_path, eos_token="[EOT]"))
    with pytest.raises(ValueError, match=r"a ledger of tokenizer .*, read with tokenizer"):
        from_json(other, line)
    with pytest.raises(ValueError, match="a ledger of template kimi-k2@1, read with template"):
        from_json(load("kimi-k2-thinking"), line)
    with pytest.raises(ValueError, match=r"no ledger: '\{'"):
        from_json(format, "{")
    table = json.loads(line)
    with pytest.raises(ValueError, match="a ledger whose lists differ in length"):
        from_json(format, json.dumps({**table, "versions": []}))


def test_hostile_text_of_tools_stays_text(load) -> None:
    format, rng = load(), random.Random(1)
    for _ in range(50):
        ledger = TokenLedger.begin(format, [{"role": "user", "content": text(rng, 30)}])
        answer(ledger, spoken(format, CALL + "<|im_end|>"))
        before = len(ledger.ids)
        ledger.add([{**RETURN, "content": text(rng, 30)}])
        names = [format.decode([t]) for t in ledger.ids[before:] if t >= format.tokenizer.num_ranks]
        assert names == ["<|im_system|>", "<|im_middle|>", "<|im_end|>"]
