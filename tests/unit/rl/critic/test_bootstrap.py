"""Preference pairs to rows that teach the critic's verdicts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_k2.data.dialogues.command import preprocess
from megatron_k2.rl.critic.bootstrap import PREFERRED, pair_rows, preference_rows
from megatron_k2.rl.critic.brief import Brief, correctness, load_prompt
from megatron_k2.rl.critic.command import critic_rows
from megatron_k2.rl.critic.pair_tasks import Pair
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.spelled import made_pairs
from tests.unit.chat.kimi_files import write_tokenizer
from tests.unit.rl.critic.critic_setting import BRIEF

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "Great question!"}
LABELS = {
    "clarity": "chosen",
    "grounded": "tie",
    "no_initial_praise": {"chosen": "pass", "rejected": "fail"},
}
BOOK = load_rubrics(("core", "prescriptive"))


def test_both_orders_are_taught_by_the_critics_own_json() -> None:
    rows = preference_rows(PAIR, load_prompt(), BOOK)
    brief = Brief(load_prompt(), (PREFERRED,))
    sides = [brief.read(row["messages"][-1]["content"], 1)[0].winner for row in rows]
    assert sides == ["A", "B"]
    texts = [row["messages"][-2]["content"] for row in rows]
    assert texts[0].index("Because.") < texts[0].index("Great question!")
    assert texts[1].index("Because.") > texts[1].index("Great question!")


def test_labelled_rubrics_are_taught_and_no_other() -> None:
    rows = preference_rows(PAIR | {"rubrics": LABELS}, load_prompt(), BOOK)
    brief = Brief(load_prompt(), tuple(one for one in BOOK.rubrics if one.name in LABELS))
    first, second = (brief.read(row["messages"][-1]["content"], 1)[0] for row in rows)
    assert first.weighed == {"clarity": "A", "grounded": "tie"} and first.winner == "A"
    assert first.failed == {"no_initial_praise": (False, True)}
    assert second.weighed == {"clarity": "B", "grounded": "tie"} and second.winner == "B"
    assert second.failed == {"no_initial_praise": (True, False)}
    assert "engagement" not in rows[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt": ""}, "prompt"), ({"chosen": None}, "chosen"), ({"rejected": 3}, "rejected"),
        ({"rubrics": {"charm": "chosen"}}, "charm"), ({"rubrics": {"clarity": "A"}}, "clarity"),
        ({"rubrics": {"no_initial_praise": "chosen"}}, "no_initial_praise"),
        ({"rubrics": ["clarity"]}, "an object"),
    ],
)  # fmt: skip
def test_wrong_pairs_are_refused(change: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        preference_rows(PAIR | change, load_prompt(), BOOK)


def test_known_pairs_give_rows_of_either_packing() -> None:
    pairs = made_pairs(6, "train", random.Random(1))
    single = list(pair_rows(pairs))
    assert len(single) == 12
    packed = list(pair_rows(pairs, pairs_per_row=3))
    assert len(packed) == 2
    verdicts = BRIEF.read(packed[0]["messages"][-1]["content"], 6)
    assert sorted(one.winner for one in verdicts) == ["A"] * 3 + ["B"] * 3


@pytest.mark.parametrize("packed", [0, 2])
def test_the_right_answers_may_stand_before_the_json(packed: int) -> None:
    pairs = made_pairs(4, "train", random.Random(1))
    plain = pair_rows(pairs, pairs_per_row=packed)
    for row, other in zip(pair_rows(pairs, None, packed, shows_work=True), plain, strict=True):
        work, said = row["messages"][-1]["content"], other["messages"][-1]["content"]
        number = 2 * packed or 1
        assert BRIEF.read(work, number) == BRIEF.read(said, number) is not None
        *words, json_text = work.split("\n")
        assert json_text == said and set(words) <= {one.right for one in pairs}
        assert len(words) == max(1, packed)
    twice = [Pair(f"{n}?", "4", "5") for n in range(2)]  # two pairs, one right answer
    (row,) = pair_rows(twice, None, 2, shows_work=True)
    assert row["messages"][-1]["content"].startswith("4\n4\n{")


def test_work_in_the_prompt_s_words_ends_in_the_letter_that_stands_behind_the_answer() -> None:
    brief = correctness("label_last")
    (pair,) = made_pairs(1, "train", random.Random(1))
    for row in pair_rows([pair], brief, shows_work=True):
        asked, said = (row["messages"][at]["content"] for at in (-2, -1))
        work, json_text = said.split("\n")
        side = json.loads(json_text)["verdicts"][0]
        assert work == f"{pair.right} {side}" and f"\n{work}" in asked
    (both,) = pair_rows([pair], brief, 1, shows_work=True)
    *lines, _ = both["messages"][-1]["content"].split("\n")
    assert sorted(lines) == [f"{pair.right} A", f"{pair.right} B"]
    assert brief.hash == replace(brief, prompt=replace(brief.prompt, work="")).hash  # not told


def test_the_tool_writes_rows_that_preprocess_sft_reads(tmp_path: Path, capsys) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        PAIR,
        PAIR | {"rubrics": LABELS},
        PAIR | {"prompt": [{"role": "user", "content": "Wh\u2028y?"}]},
    ]
    pairs.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in lines) + "\n")
    rows = tmp_path / "rows" / "critic.jsonl"
    critic_rows(["--pairs", str(pairs), "--output", str(rows)])
    assert "3 pairs (1 with labels of rubrics), 6 rows" in capsys.readouterr().out
    first = rows.read_bytes()
    critic_rows(["--pairs", str(pairs), "--output", str(rows)])
    assert rows.read_bytes() == first
    with pytest.raises(ValueError, match=f"--output {tmp_path}: Is a directory"):
        critic_rows(["--pairs", str(pairs), "--output", str(tmp_path)])
    folder = write_tokenizer(tmp_path / "kimi")
    preprocess(
        ["--input", str(rows), "--output-prefix", str(tmp_path / "out"), "--workers", "1",
         "--tokenizer-model", str(folder)]
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())["sets"]["train"]
    assert found["dialogues"] == 6 and 0 < found["learned_tokens"] < found["tokens"]
    pairs.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(ValueError, match=r"--pairs .*, line 1: rejected"):
        critic_rows(["--pairs", str(pairs), "--output", str(rows)])
    with pytest.raises(ValueError, match=r"--prompt: .*short"):
        critic_rows(["--pairs", str(pairs), "--output", str(rows), "--prompt", "short"])
    with pytest.raises(ValueError, match="--rubrics: rubrics 'cor': none"):
        critic_rows(["--pairs", str(pairs), "--output", str(rows), "--rubrics", "cor"])
    for labels, said in (
        ({"preferred": "chosen"}, "a pair without labels teaches 'preferred'"),
        ({"clarity": "better"}, 'one of "chosen", "rejected", "tie"'),
        ({"no_initial_praise": "pass"}, '"rejected": "pass" or "fail"'),
    ):
        pairs.write_text(json.dumps(PAIR | {"rubrics": labels}) + "\n")
        with pytest.raises(ValueError, match=rf"--pairs .*, line 1: .*{said}"):
            critic_rows(["--pairs", str(pairs), "--output", str(rows)])
