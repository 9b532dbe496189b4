"""The n-gram yardsticks against their slow twin, and as probability distributions."""

import math

import numpy as np
import pytest

from megatron_k2.data.ngram import bits_per_byte, fit_bigram, fit_unigram
from tests.reference import ngram as slow

VOCAB = 23


def windows(seed: int, rows: int, length: int = 9) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.minimum(generator.geometric(0.15, size=(rows, length)) - 1, VOCAB - 1)


@pytest.mark.parametrize("rows", [2, 5, 40])
def test_losses_equal_the_slow_twin(rows):
    train, heldout = windows(1, rows), windows(2, 7)
    unigram = fit_unigram(train, VOCAB).loss_nats(heldout)
    bigram = fit_bigram(train, VOCAB).loss_nats(heldout)
    flat = heldout.reshape(-1).tolist()
    # 1e-12: both are fp64, only the order of sums differs.
    assert unigram == pytest.approx(
        slow.unigram_loss(train.ravel().tolist(), flat, VOCAB), abs=1e-12
    )
    assert bigram == pytest.approx(
        slow.bigram_loss(train.tolist(), heldout.tolist(), VOCAB), abs=1e-12
    )


def test_every_bigram_context_sums_to_one_even_unseen_ones():
    model = fit_bigram(windows(3, 6), VOCAB)
    for previous in range(VOCAB):
        pairs = np.stack([np.full(VOCAB, previous), np.arange(VOCAB)], axis=1)
        total = sum(math.exp(-model.loss_nats(pair[None, :])) for pair in pairs)
        assert total == pytest.approx(1.0, abs=1e-12)


def test_unigram_sums_to_one_and_unseen_tokens_are_possible():
    model = fit_unigram(np.array([1, 1, 2]), VOCAB)
    assert np.exp(model.log_probs).sum() == pytest.approx(1.0, abs=1e-12)
    assert np.isfinite(model.log_probs).all()


def test_bigram_beats_unigram_on_a_deterministic_cycle():
    train = np.arange(400).reshape(40, 10) % 5
    heldout = np.arange(7, 107).reshape(10, 10) % 5
    assert fit_unigram(train, 5).loss_nats(heldout) == pytest.approx(math.log(5), abs=1e-6)
    assert fit_bigram(train, 5).loss_nats(heldout) < 0.05


def test_no_pair_spans_two_windows():
    model = fit_bigram(np.array([[0, 1], [2, 3]]), 4)
    assert model.pairs.tolist() == [0 * 4 + 1, 2 * 4 + 3]


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        fit_unigram(np.array([1]), VOCAB)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=10) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=40) == pytest.approx(2.0)
