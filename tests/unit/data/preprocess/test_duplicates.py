"""Deduplication: exact copies always, near copies by the MinHash curve, the first one stays."""

from __future__ import annotations

import random

import numpy as np

from megatron_k2.data.preprocess.duplicates import EXACT, KEPT, NEAR, Duplicates, SeenKeys
from megatron_k2.data.preprocess.minhash import BAND_ROWS, NUM_BANDS, bands


def words(generator: random.Random, count: int) -> list[str]:
    return [f"w{generator.randrange(10**6)}" for _ in range(count)]


def test_pairs_are_found_as_often_as_the_curve_says() -> None:
    """The share of pairs with a common band, over similarities, against 1 - (1 - s^8)^16."""
    generator = random.Random(0)
    for share_changed in (0.01, 0.03, 0.06):
        hits, expected = 0, 0.0
        for _ in range(80):
            text = words(generator, 300)
            other = [w if generator.random() > share_changed else "new" + w for w in text]
            shingles = [
                {" ".join(row[i : i + 8]) for i in range(len(row) - 7)} for row in (text, other)
            ]
            similarity = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
            expected += 1 - (1 - similarity**BAND_ROWS) ** NUM_BANDS
            hits += bool((bands(" ".join(text)) == bands(" ".join(other))).any())
        # Three standard deviations of 80 coin tosses at most, and the empty bins' share.
        assert abs(hits - expected) < 3 * 80**0.5 * 0.5


def test_unrelated_texts_share_no_band_and_short_ones_have_none() -> None:
    generator = random.Random(1)
    keys = np.stack(
        [bands(" ".join(words(generator, generator.randrange(8, 300)))) for _ in range(500)]
    )
    assert len(np.unique(keys)) == keys.size
    assert not bands("only seven words are in this text").any()
    assert not bands("").any()


def test_seen_keys_are_a_set() -> None:
    generator = np.random.default_rng(0)
    seen, twin = SeenKeys(), set()
    for _ in range(60):
        keys = generator.integers(0, 3000, generator.integers(0, 200)).astype(np.uint64)
        assert seen.contains(keys).tolist() == [key in twin for key in keys.tolist()]
        seen.add(keys)
        twin |= set(keys.tolist())
    assert len(seen._runs) < 12


def test_the_first_stays_within_a_part_and_across() -> None:
    none = np.empty((0, 1), dtype=np.uint64)
    judge = Duplicates()
    verdicts, keys = judge.judge(np.array([5, 6, 5], dtype=np.uint64), none)
    assert verdicts.tolist() == [KEPT, KEPT, EXACT] and keys.tolist() == [5, 6]
    assert judge.judge(np.array([6, 7], dtype=np.uint64), none)[0].tolist() == [EXACT, KEPT]
    resumed = Duplicates()
    resumed.restore(keys)
    assert resumed.judge(np.array([6, 7], dtype=np.uint64), none)[0].tolist() == [EXACT, KEPT]


def test_a_copy_of_what_was_left_out_is_not_held_against_it() -> None:
    """b is near a and left out; c is near b only: it stays. 0 is no key."""
    judge = Duplicates()
    hashes = np.array([1, 2, 3, 4, 5], dtype=np.uint64)
    near = np.array([[10, 20], [10, 30], [40, 30], [0, 0], [0, 0]], dtype=np.uint64)
    assert judge.judge(hashes, near)[0].tolist() == [KEPT, NEAR, KEPT, KEPT, KEPT]
