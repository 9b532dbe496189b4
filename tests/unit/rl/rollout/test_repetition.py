"""Loops are found at every period, and nothing else is."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from megatron_k2.rl.rollout.repetition import LoopWatch, Repetition
from tests.unit.rl.rollout.scripted import small_format


def slow(ids: list[int], rule: Repetition) -> bool:
    """The definition: some last tokens have a period."""
    for period in range(1, rule.max_period + 1):
        needed = rule.needed(period)
        tail = ids[-needed:]
        if len(tail) == needed and all(
            tail[at] == tail[at - period] for at in range(period, needed)
        ):
            return True
    return False


@pytest.mark.parametrize("period", range(1, 65))
def test_a_loop_of_each_period_is_found_when_it_is_long_enough(period: int) -> None:
    source = random.Random(period)
    rule = Repetition(min_tokens=32, min_repeats=4)
    unit = [-1, *(source.randrange(1000) for _ in range(period - 1))]  # no shorter period
    before = [source.randrange(1000) for _ in range(50)]
    watch = LoopWatch(rule)
    loop = (unit * 200)[: rule.needed(period)]
    assert watch.feed(before + loop[:-1]) == 0
    assert watch.feed(loop[-1:]) == period


def test_it_agrees_with_its_definition() -> None:
    rule = Repetition(max_period=5, min_tokens=7, min_repeats=3)
    for seed in range(100):
        source = random.Random(seed)
        watch, ids = LoopWatch(rule), []
        for _ in range(60):
            ids.append(source.randrange(2))
            found = watch.feed(ids[-1:])
            assert bool(found) == slow(ids, rule), (seed, ids)


def test_texts_code_and_tables_are_no_loops() -> None:
    encode = small_format().encode_text
    root = Path(__file__).resolve().parents[4]
    texts = [
        (root / "README.md").read_text()[:20_000],
        (root / "megatron_k2/engine/core.py").read_text(),
        "| a | b |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(200)),
        "".join(f"x{n} = table[{n}]\n" for n in range(200)),
        "-" * 120 + "\n" + "0, " * 60,
    ]
    source = random.Random(0)
    for ids in [*map(encode, texts), [source.randrange(50) for _ in range(20_000)]]:
        assert LoopWatch(Repetition()).feed(ids) == 0
    assert LoopWatch(Repetition()).feed(encode("again and again, " * 200)) > 0


def test_reading_is_cheap() -> None:
    source = random.Random(0)
    ids = [source.randrange(50) for _ in range(20_000)]
    began = time.process_time()
    LoopWatch(Repetition()).feed(ids)
    assert (time.process_time() - began) / len(ids) < 50e-6  # 3 us where this was written


@pytest.mark.parametrize("bad", [dict(max_period=0), dict(min_repeats=1), dict(min_tokens=1)])
def test_rules_that_mean_nothing_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="or more"):
        Repetition(**bad)
