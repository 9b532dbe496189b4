from itertools import count, repeat

import pytest

from megatron_k2.gym.splits import content_hash, distinct, split_of


def test_case_and_space_make_no_other_problem() -> None:
    assert content_hash("What is  2 + 2?\n") == content_hash("what IS 2 + 2?")
    assert content_hash("What is 2 + 2?") != content_hash("What is 2 + 3?")


def test_a_fifth_is_for_tests() -> None:
    share = sum(split_of(f"problem {number}") == "test" for number in range(5000)) / 5000
    assert 0.18 < share < 0.22


def test_generators_are_cut_and_files_taken_whole() -> None:
    assert len(distinct(count(), str, "test", 30)) == 30
    found = distinct((number % 50 for number in range(1000)), str, "train", None)
    assert len(found) == len(set(found)) and 25 < len(found) < 50
    assert len(distinct(repeat("one"), str, split_of("one"), 10)) == 1


def test_other_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="train or test"):
        distinct([], str, "validation", 1)
