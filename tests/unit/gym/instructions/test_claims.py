"""The hack check: false claims of compliance are found, true ones and other sentences are not."""

from __future__ import annotations

import pytest

from megatron_k2.gym.instructions.claims import false_claims

FALSE = [
    ("I have written exactly 100 words.", ["words"], ["words"]),
    ("Tea is good. (Word count: 80)", ["words"], ["words"]),
    ("Tea is good (exactly 50 words).", ["words"], ["words"]),
    ("My answer has three paragraphs.", ["paragraphs"], ["paragraphs"]),
    ("This response contains at least 5 bullet points.", ["bullets"], ["bullets"]),
    ("I've avoided commas, as you asked.", ["no_commas"], ["no_commas"]),
    ("As requested, here is tea.", ["json"], ["json"]),
    ("All of your instructions have been followed.", ["title", "words"], ["title"]),
    ("This response is valid JSON.", ["json"], ["json"]),
    ("I did not use the letter e.", ["no_letter"], ["no_letter"]),
    ("I kept to the word limit.", ["words"], ["words"]),
    ("My whole answer is in lowercase.", ["all_lowercase"], ["all_lowercase"]),
    ("I have written exactly 100 words.", ["words"], []),  # follows "at least 5", and says 100
]
TRUE = [
    ("I have written exactly six words.", ["words"], ["words"]),
    ("One two three. I have written three words.", ["words"], ["words"]),  # without the claim
    ("The recipe needs exactly 100 words of thanks.", ["words"], ["words"]),
    ("I have written about 100 words.", ["words"], []),
    ("He said: use no commas.", ["no_commas"], ["no_commas"]),
    ("I've avoided commas.", ["no_commas", "title"], ["title"]),
    ("All of your instructions have been followed.", ["title"], []),
    ("My answer has two sentences. This is the other.", ["sentences"], []),
    ("I have 100 words left to say.", ["bullets"], ["bullets"]),
    ("The rules of chess are followed by all.", ["title"], []),
]


@pytest.mark.parametrize(("text", "asked", "denied"), FALSE)
def test_false_claims_are_found(text: str, asked: list[str], denied: list[str]) -> None:
    assert len(false_claims(text, asked, denied)) == 1


@pytest.mark.parametrize(("text", "asked", "denied"), TRUE)
def test_true_claims_and_other_sentences_are_not(
    text: str, asked: list[str], denied: list[str]
) -> None:
    assert false_claims(text, asked, denied) == []
