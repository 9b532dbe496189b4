"""The probe's verdicts against a slow twin, and the intervals of the report."""

import math

import numpy as np
import pytest
import torch

from megatron_k2.training.fact_probe.report import Arm, by_person, difference, draw_arms, share
from megatron_k2.training.fact_probe.scores import Cloze, encode, ends_of_words, judge

VOCABULARY = 12
ENDS = torch.tensor([n % 3 == 0 for n in range(VOCABULARY)])


def random_model(ids: torch.Tensor) -> torch.Tensor:
    """Logits that depend on all tokens so far, with two columns of padding."""
    logits = torch.empty(*ids.shape, VOCABULARY + 2)
    for row, tokens in enumerate(ids.tolist()):
        for place in range(len(tokens)):
            seed = hash(tuple(tokens[: place + 1])) % 2**31
            generator = torch.Generator().manual_seed(seed)
            logits[row, place] = 3 * torch.randn(VOCABULARY + 2, generator=generator)
    return logits


def slow_verdict(question: Cloze) -> tuple[bool, bool]:
    """One candidate at a time; greedy decoding token by token."""

    def log_probs(ids: tuple[int, ...]) -> torch.Tensor:
        return random_model(torch.tensor([ids]))[0, -1, :VOCABULARY].double().log_softmax(-1)

    scores = []
    for candidate in question.candidates:
        score = 0.0
        for n, token in enumerate(candidate):
            score += float(log_probs(question.prompt + candidate[:n])[token])
        scores.append(score)
    answer = question.candidates[question.answer]
    written: tuple[int, ...] = ()
    for _ in range(len(answer) + 1):
        written += (int(log_probs(question.prompt + written).argmax()),)
    exact = written[:-1] == answer and bool(ENDS[written[-1]])
    return max(range(len(scores)), key=scores.__getitem__) == question.answer, exact


def test_verdicts_are_those_of_the_slow_twin():
    draw = np.random.default_rng(0)
    questions = []
    for _ in range(80):
        sizes = draw.integers(1, 4, size=4)
        words = {tuple(map(int, draw.integers(0, VOCABULARY, size=size))) for size in sizes}
        prompt = tuple(map(int, draw.integers(0, VOCABULARY, size=draw.integers(1, 6))))
        words |= {(int(random_model(torch.tensor([prompt]))[0, -1, :VOCABULARY].argmax()),)}
        candidates = tuple(sorted(words))
        questions.append(Cloze(prompt, candidates, int(draw.integers(len(candidates)))))
    found = [(one.choice, one.exact) for one in judge(random_model, questions, ENDS)]
    assert found == [slow_verdict(question) for question in questions]
    assert {True, False} == {choice for choice, _ in found} == {exact for _, exact in found}


def test_candidates_that_begin_alike_share_a_pass():
    years = tuple((1, 8, decade, year) for decade in range(3) for year in range(10))
    question = Cloze((2,), years, 0)
    assert question.rows() == [(1, 8, 0, 0), (1, 8, 1), (1, 8, 2)]
    assert Cloze((2,), ((3,), (4,)), 1).rows() == [(4,)]


def test_a_question_becomes_the_ids_of_running_text():
    class Letters:
        """A tokenizer of single signs."""

        def encode(self, text):
            return [ord(sign) for sign in text]

        def eos_id(self):
            return 0

        def get_piece_size(self):
            return 4

        def id_to_piece(self, ids):
            return ["\u2581a", "b", ".", "7"]

    question = encode(Letters(), "ab", ["c", "de"], "de")
    assert question == Cloze((0, 97, 98), ((32, 99), (32, 100, 101)), 1)
    assert ends_of_words(Letters()).tolist() == [True, False, True, False]


def arm(name: str, shares: dict[int, float], people: int = 40) -> Arm:
    right = {
        seed: (np.arange(people) < share * people).astype(float) for seed, share in shares.items()
    }
    curves = {seed: {100: share} for seed, share in shares.items()}
    return Arm(name, right, curves, curves)


def test_shares_are_counted_by_person():
    assert by_person(["b", "b", "a", "b"], [1, 0, 1, 1]).tolist() == pytest.approx([2 / 3, 1.0])


def test_intervals_hold_the_spread_of_people_and_of_seeds():
    one = share(arm("one", {1: 0.5}))
    assert one.value == 0.5
    assert one.high - one.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)
    three = share(arm("three", {1: 0.2, 2: 0.5, 3: 0.8}))
    assert three.value == pytest.approx(0.5) and three.high - three.low > one.high - one.low


def test_differences_are_taken_person_by_person():
    first, second = arm("first", {1: 0.5, 2: 0.5}), arm("second", {1: 0.5, 2: 0.5, 3: 0.9})
    drawn, students = difference(first, second)
    assert drawn.low == drawn.high == students.value == 0.0  # not the sum of two spreads


def test_the_picture_is_drawn(tmp_path):
    arms = [arm("a", {1: 0.2, 2: 0.3}), arm("b", {1: 0.4, 2: 0.5})]
    draw_arms(tmp_path / "arms.png", arms, 1 / 40, "two arms")
    assert (tmp_path / "arms.png").stat().st_size > 1000
