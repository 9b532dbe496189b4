"""Nucleus sampling: what is kept, what is never drawn, where it stops."""

from types import SimpleNamespace

import pytest
import torch

from megatron_k2.inputs import UsageError
from megatron_k2.training.sample import check_sample_args, choose_token, continue_tokens

PROBS = torch.tensor([0.5, 0.3, 0.15, 0.05])


def draws(temperature: float, top_p: float, count: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {choose_token(PROBS.log(), temperature, top_p, generator) for _ in range(count)}


def test_only_the_smallest_set_that_reaches_top_p_is_drawn_from():
    assert draws(1.0, 0.5) == {0}
    assert draws(1.0, 0.51) == {0, 1}
    assert draws(1.0, 0.9) == {0, 1, 2}
    assert draws(1.0, 1.0) == {0, 1, 2, 3}


def test_temperature_zero_is_greedy_and_a_low_one_nearly():
    assert draws(0.0, 1.0) == {0}
    assert draws(0.05, 1.0) == {0}


def test_frequencies_follow_the_kept_probabilities():
    generator = torch.Generator().manual_seed(1)
    drawn = [choose_token(PROBS.log(), 1.0, 0.8, generator) for _ in range(4000)]
    # 0.5 / 0.8; 5 standard deviations of a binomial share.
    assert abs(drawn.count(0) / 4000 - 0.625) < 5 * (0.625 * 0.375 / 4000) ** 0.5


class Counter(torch.nn.Module):
    """Predicts the next integer; sees how long its contexts are."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocab, self.lengths = vocab, []

    def forward(self, tokens, positions, attention_mask):
        self.lengths.append(tokens.shape[1])
        assert positions.tolist() == [list(range(tokens.shape[1]))]
        return torch.nn.functional.one_hot((tokens + 1) % self.vocab, self.vocab) * 50.0


def test_generation_stops_at_eod_and_never_sees_more_than_its_context():
    model = Counter(20)
    assert continue_tokens(model, [3], 100, 4, eod=9, vocab_size=20) == [4, 5, 6, 7, 8]
    assert model.lengths == [1, 2, 3, 4, 4, 4]


def test_padding_of_the_vocabulary_is_never_sampled():
    tokens = continue_tokens(Counter(20), [8], 5, 8, eod=99, vocab_size=10, temperature=1.0)
    assert len(tokens) == 5 and max(tokens) < 10


def test_the_same_seed_gives_the_same_tokens():
    model = Counter(20)
    first, again = (
        continue_tokens(model, [1], 30, 8, 99, 20, temperature=40.0, seed=5) for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize(
    ("flag", "value"), [("top_p", 0.0), ("top_p", 1.5), ("temperature", -1.0), ("sample_tokens", 0)]
)
def test_flags_out_of_range_are_refused_by_name(flag, value):
    args = SimpleNamespace(load="run", k2_top_p=0.9, k2_temperature=0.0, k2_sample_tokens=1)
    check_sample_args(args)
    setattr(args, f"k2_{flag}", value)
    with pytest.raises(UsageError, match=f"--k2-{flag.replace('_', '-')} {value:g} must be"):
        check_sample_args(args)
