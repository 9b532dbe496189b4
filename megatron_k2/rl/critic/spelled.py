"""Made pairs: a word spelled backward, rightly and nearly so.

What a model of a million weights can learn to tell apart, and what the policy's own mistakes in
reasoning-gym's ``spell_backward`` look like. Words are drawn letters. Splits are the gym's, by the
text of the question, which is reasoning-gym's: a word of the test split here is one there too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_k2.gym.base import Task
from megatron_k2.gym.splits import split_of
from megatron_k2.rl.critic.groups import question_of
from megatron_k2.rl.critic.pair_tasks import Pair

QUESTION = "Spell this word backward (example: sun -> nus): {word}"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (3, 4, 5)
Mistakes = Literal["one", "all"]
_TAGGED = re.compile(r"(?s)(.*<answer>)(.*?)(</answer>.*)")


def spelled_pair(
    word: str, roll: random.Random, question: str = QUESTION, mistakes: Mistakes = "one"
) -> Pair:
    """Return a pair for a word: its letters backward, and the same with ``one`` mistake.

    With ``all`` every letter is another one: told apart by any of them, a first lesson.

    Raises:
        ValueError: a word of one letter or less.
    """
    if len(word) < 2:
        raise ValueError(f"{word!r}: a word of two letters or more is needed")
    right = word[::-1]
    if mistakes == "all":
        wrong = "".join(roll.choice(LETTERS.replace(letter, "")) for letter in right)
    else:
        wrong = _mistaken(right, roll)
    return Pair(question.replace("{word}", word), right, wrong, "spelled")


def made_pairs(
    count: int,
    split: str,
    roll: random.Random,
    question: str = QUESTION,
    mistakes: Mistakes = "one",
) -> list[Pair]:
    """Return pairs for so many different drawn words of a split."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(roll.choices(LETTERS, k=roll.choice(LENGTHS)))
        if split_of(QUESTION.format(word=word)) == split:
            words[word] = None
    return [spelled_pair(word, roll, question, mistakes) for word in words]


def pairs_of_tasks(tasks: Sequence[Task], gold: Callable[[Task], str], seed: int = 0) -> list[Pair]:
    """Return a pair a task: its right answer, and the same with one mistake.

    Of a run's held-out tasks they are pairs that look like those of its closed loop: the question
    as the policy reads it, the mistake between the answer's tags where it has some.

    Args:
        tasks: whose answers are words.
        gold: right answer of a task, such as ``lambda task: env.gold(task)[0].text``.
        seed: of the mistakes.
    """
    found = []
    for task in tasks:
        right, roll = gold(task), random.Random(f"{seed} {task.id}")
        tagged = _TAGGED.fullmatch(right)
        if tagged:
            wrong = tagged[1] + _mistaken(tagged[2], roll) + tagged[3]
        else:
            wrong = _mistaken(right, roll)
        found.append(Pair(question_of(task), right, wrong, task.env))
    return found


def _mistaken(right: str, roll: random.Random) -> str:
    """Return a text of the same length with two neighbours swapped or one letter replaced."""
    unequal = [at for at in range(len(right) - 1) if right[at] != right[at + 1]]
    if unequal and roll.random() < 0.5:
        at = roll.choice(unequal)
        return right[:at] + right[at + 1] + right[at] + right[at + 2 :]
    at = roll.randrange(len(right))
    letter = roll.choice([one for one in LETTERS if one != right[at]])
    return right[:at] + letter + right[at + 1 :]
