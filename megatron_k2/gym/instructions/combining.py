"""Tasks of several instructions: kinds that fit together, parameters that a gold answer exists for.

``combine`` draws parameters until ``compose.gold`` makes an answer; kinds that never agree are
reported, not passed on. At least one instruction is such that a text follows it only by trying.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from random import Random

from megatron_k2.gym.base import Task
from megatron_k2.gym.instructions.compose import gold
from megatron_k2.gym.instructions.plan import Unsatisfiable
from megatron_k2.gym.instructions.rule import Instruction
from megatron_k2.gym.instructions.rules import RULES, fit_together, is_passive, stated
from megatron_k2.gym.splits import content_hash, distinct

DRAWS = 24  # of parameters for one choice of kinds
MOST_INSTRUCTIONS = 4
ChooseKinds = Callable[[Random], Sequence[str]]


@cache
def requests() -> tuple[str, ...]:
    """Return the built-in requests."""
    text = resources.files(__package__).joinpath("requests.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["requests"])


def combine(kinds: Sequence[str], request: str, rng: Random) -> list[Instruction]:
    """Return instructions of these kinds that one answer can follow.

    Raises:
        Unsatisfiable: no parameters were found.
    """
    why = ""
    for _ in range(DRAWS):
        asked = [Instruction(kind, RULES[kind].draw(rng, request)) for kind in kinds]
        if all(map(is_passive, asked)):
            why = "most texts follow them"
            continue
        try:
            gold(asked)
        except Unsatisfiable as error:
            why = str(error)
            continue
        return asked
    raise Unsatisfiable(f"{', '.join(kinds)}: {why}")


def any_kinds(rng: Random) -> list[str]:
    """Return kinds that fit together, one to four, each equally likely."""
    count = rng.randint(1, MOST_INSTRUCTIONS)
    while True:
        kinds = rng.sample(sorted(RULES), count)
        if fit_together(kinds):
            return kinds


def prompt_of(request: str, asked: Sequence[Instruction], more: Sequence[str] = ()) -> str:
    """Return a request with its instructions in words."""
    lines = [*map(stated, asked), *more]
    return f"{request}\n\n" + "\n".join(f"- {line}" for line in lines)


def make_task(
    env: str, request: str, asked: Sequence[Instruction], tags: Sequence[str] = ()
) -> Task:
    """Return the task of a request and its instructions."""
    prompt = prompt_of(request, asked)
    return Task(
        f"{env}-{content_hash(prompt)}",
        env,
        ({"role": "user", "content": prompt},),
        {"request": request, "instructions": [one.as_json() for one in asked]},
        tags=("domain:instructions", *(f"kind:{one.kind}" for one in asked), *tags),
    )


def drawn(env: str, seed: int, choose: ChooseKinds = any_kinds) -> Iterator[Task]:
    """Yield tasks without end; some may come twice.

    Args:
        env: name of their environment.
        seed: of requests, kinds and parameters.
        choose: kinds that fit together.
    """
    rng = Random(f"{env}/{seed}")
    while True:
        request = rng.choice(requests())
        with suppress(Unsatisfiable):
            yield make_task(env, request, combine(choose(rng), request, rng))


def tasks(
    env: str, split: str, num_tasks: int, seed: int, choose: ChooseKinds = any_kinds
) -> list[Task]:
    """Return different tasks of a split; see ``drawn`` and ``splits.distinct``."""
    return distinct(drawn(env, seed, choose), _prompt, split, num_tasks)


def _prompt(task: Task) -> str:
    return str(task.messages[0]["content"])
