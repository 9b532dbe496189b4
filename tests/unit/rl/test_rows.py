"""Packing of episodes: each token once, in its place, with its own figures."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_k2.chat.ledger import TrainingRow
from megatron_k2.rl.rows import LIVE, Sample, empty_row, episode_rows, pack, ptx_row, sample_from


def sample(length: int, prompt: int, seed: int) -> Sample:
    """An episode of random ids, whose tokens behind the prompt were sampled."""
    rng = np.random.default_rng(seed)
    learned = np.arange(length) >= prompt
    routes = np.where(learned[:, None, None], rng.integers(8, size=(length, 3, 2)), LIVE)
    return Sample(
        rng.integers(100, size=length),
        learned,
        np.where(learned, -rng.random(length), 0.0),
        learned,
        0.0,
        1.0,
        routes.astype(np.int16),
    )


def test_every_sampled_token_is_in_the_rows_once_with_its_figures() -> None:
    samples = [sample(length, 3, seed) for seed, length in enumerate([9, 20, 33, 5, 12, 31])]
    rows = episode_rows(samples, 32)
    assert sorted(number for row in rows for number in row.members) == list(range(6))
    for number, one in enumerate(samples):
        row = next(row for row in rows if number in row.members)
        part = np.flatnonzero(row.episodes == number)
        assert (np.diff(part) == 1).all() and part[0] in row.bounds
        np.testing.assert_array_equal(row.tokens[part], one.ids[:-1])
        np.testing.assert_array_equal(row.labels[part], one.ids[1:])
        np.testing.assert_array_equal(row.positions[part], np.arange(len(one.ids) - 1))
        np.testing.assert_array_equal(row.mask[part], one.learned[1:])
        np.testing.assert_allclose(row.behaviour[part], one.log_probs[1:], rtol=1e-6)
        assert row.routes is not None and one.routes is not None
        np.testing.assert_array_equal(row.routes[part], one.routes[1:].reshape(len(part), -1))
    for row in rows:
        assert row.bounds[0] == 0 and row.bounds[-1] == 32
        padding = row.episodes < 0
        assert row.mask[padding].sum() == 0


def test_rows_are_few_and_the_same_whenever_they_are_made() -> None:
    lengths = [20, 12, 30, 2, 10, 22]
    plan = pack(lengths, 32)
    assert plan == pack(lengths, 32)
    assert len(plan) == 3, "96 places fill three rows exactly"
    with pytest.raises(ValueError, match="--seq-length 32"):
        pack([33], 32)


def test_a_ledgers_row_keeps_what_was_sampled_and_from_which_weights() -> None:
    row = TrainingRow(
        [5, 6, 7, 8], [0, 0, 1, 1], [0.0, 0.0, -0.5, -0.25], [-1, -1, 3, 4],
        [[], [], [[1, 2]], [[3, 4]]],
    )  # fmt: skip
    found = sample_from(row, version=4, advantage=0.5, weight=0.25)
    assert found.learned.tolist() == [False, False, True, True]
    assert found.is_current.tolist() == [False, False, False, True]
    assert found.routes is not None
    assert found.routes[:, 0].tolist() == [[LIVE, LIVE]] * 3 + [[3, 4]]


def test_ptx_and_empty_rows_have_no_episode() -> None:
    ids, learned = np.arange(10), np.ones(10, dtype=np.uint8)
    row = ptx_row([(ids, learned), (ids[:4], learned[:4])], 32)
    assert row.is_ptx and row.mask.sum() == 9 + 3 and row.bounds == (0, 9, 12, 32)
    assert (row.episodes < 0).all()
    assert empty_row(32).mask.sum() == 0
