"""Measures tasks: k answers each and guesses, every one a line of a journal.

A run that was killed goes on; answers that could not be judged are asked for again then, since what
failed may work now. Seeds follow from task and number of the answer, so that order and concurrency
change nothing that the engine does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.gym.base import Environment, Task
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.journal import CheckedLines, JournalBusy
from megatron_k2.rl.curation.asking import Played, Rules, play
from megatron_k2.rl.curation.difficulty import Measured

Kinds = Callable[[str], type[Environment]]


@dataclass(frozen=True)
class Measuring:
    """How tasks are measured.

    Attributes:
        samples: answers a task; Kimi k1.5 takes 10.
        temperature, top_p, max_tokens: of an answer; the temperature is high.
        guesses: tries without reasoning; 8 as Kimi k1.5; 0: no guess filter.
        guess_tokens: of a guess at most.
        seed: of the run.
        concurrency: answers under way.
    """

    samples: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    guesses: int = 8
    guess_tokens: int = 64
    seed: int = 0
    concurrency: int = 16


@dataclass(frozen=True)
class _Unit:
    """One answer to be had."""

    key: str
    task: Task
    is_guess: bool


async def measure(
    tasks: Sequence[Task],
    engine: Engine,
    chat_format: ChatFormat,
    services: Services,
    rules: Measuring,
    journal: Path,
    model: str,
    quiet: bool = False,
    kinds: Kinds = environment,
) -> list[Measured]:
    """Return what the model does with each task.

    Args:
        tasks: of any environments.
        engine: the SFT model.
        chat_format: of the model.
        services: for the environments.
        rules: see ``Measuring``.
        journal: of this run; made where there is none.
        model: name of the model: a journal of another is refused.
        quiet: no progress bar.
        kinds: environment's name -> class.

    Raises:
        ValueError: the journal is another run's, or an environment's need is missing.
        RuntimeError: the engine fails; the same call goes on.
    """
    for name in sorted({task.env for task in tasks}):
        kinds(name)(services)  # what is missing is said before the first answer
    lines = _open(journal, _identity(tasks, rules, model))
    done = {row["key"]: row for row in lines.before if row.get("status") in ("ok", "wrong")}
    units = _units(tasks, rules)
    gate = asyncio.Semaphore(rules.concurrency)

    async def one(unit: _Unit) -> None:
        async with gate:
            played = await play(
                kinds(unit.task.env)(services), unit.task, engine, chat_format,
                _rules(rules, unit.is_guess), _seed(rules.seed, unit.key), unit.key,
            )  # fmt: skip
        done[unit.key] = row = _row(unit, played)
        lines.append(row, to_disk=False)
        bar.update()

    before = sum(unit.key in done for unit in units)
    with tqdm(total=len(units), initial=before, unit="answer", disable=quiet) as bar:
        try:
            async with asyncio.TaskGroup() as group:
                for unit in units:
                    if unit.key not in done:
                        group.create_task(one(unit))
        except* (ValueError, RuntimeError) as errors:
            raise errors.exceptions[0] from None
        finally:
            lines.close()
    return [_measured(task, rules, done) for task in tasks]


def _units(tasks: Sequence[Task], rules: Measuring) -> list[_Unit]:
    found = []
    for task in tasks:
        name = f"{task.env}/{task.id}"
        found += [_Unit(f"{name}/{number}", task, False) for number in range(rules.samples)]
        if not task.tools:  # what takes tools cannot be guessed in one answer
            found += [_Unit(f"{name}/guess{number}", task, True) for number in range(rules.guesses)]
    return found


def _rules(rules: Measuring, is_guess: bool) -> Rules:
    most = rules.guess_tokens if is_guess else rules.max_tokens
    return Rules(rules.temperature, rules.top_p, most, is_guess)


def _row(unit: _Unit, played: Played) -> dict[str, Any]:
    verdict = played.verdict
    found = {"key": unit.key, "status": verdict.status, "score": verdict.score}
    return {**found, "tokens": played.tokens, "detail": verdict.detail, "text": played.text}


def _measured(task: Task, rules: Measuring, done: dict[str, dict[str, Any]]) -> Measured:
    name = f"{task.env}/{task.id}"
    answers = [done[f"{name}/{number}"] for number in range(rules.samples)]
    guesses = [done.get(f"{name}/guess{number}") for number in range(rules.guesses)]
    judged = [one for one in answers if one["score"] is not None]
    tried = [one for one in guesses if one is not None and one["score"] is not None]
    return Measured(
        tries=len(judged),
        right=sum(one["status"] == "ok" for one in judged),
        unjudged=len(answers) - len(judged),
        guesses=len(tried),
        guessed=sum(one["status"] == "ok" for one in tried),
        mean_tokens=sum(one["tokens"] for one in answers) / max(1, len(answers)),
    )


def _seed(*parts: object) -> int:
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 2


def _identity(tasks: Sequence[Task], rules: Measuring, model: str) -> str:
    how = asdict(rules) | {"model": model}
    del how["concurrency"]
    content = json.dumps([how, [asdict(task) for task in tasks]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _open(path: Path, identity: str) -> CheckedLines:
    try:
        lines = CheckedLines(path)
    except JournalBusy as error:
        raise ValueError(f"--output: another run is writing {path}") from error
    if not lines.before:
        lines.append({"run": identity}, to_disk=True)
    elif lines.before[0].get("run") != identity:
        lines.close()
        raise ValueError(f"{path}: measured other tasks, or otherwise; give another --output")
    return lines
