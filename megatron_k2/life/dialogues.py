"""``python -m megatron_k2.life.dialogues``: what the small model is tuned on, and asked afterwards.

Three kinds of rows: dialogues with tools as synthesis made them, words spelt backward with their
answers (reasoning-gym's ``spell_backward``), and verdicts on pairs of such answers, the critic's
first lessons (arXiv 2507.20534, 3.2.2). Held out are what the gym and synthesis call ``test``: its
questions for tools end with the first answer that calls one, which is the reference.
``open.jsonl`` has invented words without answers, for the policy as its own critic.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.gym.base import Task
from megatron_k2.gym.reasoning import Reasoning
from megatron_k2.gym.services import Services
from megatron_k2.gym.verifiers import InlineVerifiers
from megatron_k2.rl.critic.bootstrap import pair_rows
from megatron_k2.rl.critic.brief import correctness
from megatron_k2.rl.critic.spelled import made_pairs
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.stages import write_json

SPELL = "spell_backward"
LENGTHS = {"min_word_len": 3, "max_word_len": 5}  # as the run file's: what a million weights learn
SYSTEM = {"role": "system", "content": "K2"}
OPEN_WORDS = {"train": 512, "test": 32}  # an environment has tasks in both splits
Row = dict[str, Any]


def words(split: str, count: int, seed: int) -> list[tuple[Task, str]]:
    """Return tasks of spelling and their right answers."""
    env = Reasoning(Services(verifiers=InlineVerifiers()))
    parameters = {SPELL: LENGTHS}
    tasks = Reasoning.load(
        split, count, seed, datasets=[SPELL], parameters=parameters, instruction=""
    )
    return [(task, env.gold(task)[0].text) for task in tasks]


def spelling_rows(found: Iterable[tuple[Task, str]]) -> Iterator[Row]:
    """Yield a dialogue a word."""
    for task, answer in found:
        said = {"role": "assistant", "content": answer}
        yield {"messages": [SYSTEM, *task.messages, said]}


def verdict_rows(count: int, seed: int) -> Iterator[Row]:
    """Yield verdicts on pairs: one comparison, as a tournament asks, or a pair in both orders."""
    pairs = made_pairs(count, "train", random.Random(f"life {seed}"))
    half = len(pairs) // 2
    brief = correctness("compact")
    yield from pair_rows(pairs[:half], brief, 0, shows_work=True)
    yield from pair_rows(pairs[half:], brief, 1, shows_work=True)


def calls(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield dialogues up to and with the first answer that calls a tool."""
    for row in rows:
        for at, message in enumerate(row["messages"]):
            if message.get("tool_calls"):
                yield {"messages": row["messages"][: at + 1], "tools": row["tools"]}
                break


def read_rows(path: Path) -> list[Row]:
    """Return the lines of a JSONL file.

    Raises:
        ValueError: it is not there, or holds nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not lines:
        raise ValueError(f"{path}: no dialogue in it")
    return [json.loads(line) for line in lines]


def write(args: argparse.Namespace) -> None:
    """Write ``train.jsonl``, ``calls.jsonl``, ``tasks.jsonl`` and ``open.jsonl``.

    Raises:
        ValueError: rows of synthesis that are not there.
    """
    agentic = [
        {"messages": row["messages"], "tools": row["tools"]} for row in read_rows(args.agentic)
    ]
    spelled = list(spelling_rows(words("train", args.words, args.seed)))
    verdicts = list(verdict_rows(args.verdicts, args.seed))
    asked = list(calls(read_rows(args.agentic_heldout)))
    tasks = [
        {"id": task.id, "messages": [SYSTEM, *task.messages], "answer": answer}
        for task, answer in words("test", args.questions, args.seed)
    ]
    open_ = [
        {"prompt": pair.question}
        for split, count in OPEN_WORDS.items()
        for pair in made_pairs(count, split, random.Random(f"open {split} {args.seed}"))
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [*agentic * args.repeat, *spelled, *verdicts]
    random.Random(args.seed).shuffle(rows)
    for name, lines in (("train", rows), ("calls", asked), ("tasks", tasks), ("open", open_)):
        body = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        publish_text(args.output / f"{name}.jsonl", body + "\n")
    counts = {"agentic": len(agentic), "spelled": len(spelled), "verdicts": len(verdicts)}
    write_json(args.output / "dialogues.json", {**counts, "calls": len(asked)})
    print(f"[dialogues] {counts}, held out: {len(asked)} questions for tools, {len(tasks)} words")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser("python -m megatron_k2.life.dialogues", description=__doc__)
    add = made.add_argument
    add("--output", type=Path, required=True, metavar="DIR")
    add("--agentic", type=Path, required=True, metavar="JSONL", help="rows of synthesis")
    add("--agentic-heldout", type=Path, required=True, metavar="JSONL", help="its test rows")
    add("--repeat", type=int, default=1, help="of the rows of synthesis; default 1")
    add("--words", type=int, default=9000, help="to spell; default 9000")
    add("--verdicts", type=int, default=400, help="pairs that verdicts are about; default 400")
    add("--questions", type=int, default=200, help="held-out words; default 200")
    add("--seed", type=int, default=1)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
