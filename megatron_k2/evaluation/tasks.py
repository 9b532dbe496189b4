"""Tasks with known answers: a JSONL file, a rule that says when an answer is right.

A line is ``{"prompt": "..."}`` or ``{"messages": [...]}``, perhaps with ``tools``, and ``answer``
or a list of ``answers``; ``match`` names the rule, ``group`` what the report counts apart, ``id``
the task (its line's hash otherwise).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_k2.chat.messages import read_dialogue

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        id: unique in the file.
        messages: in OpenAI's form.
        tools: declarations, may be empty.
        answers: any of them is right.
        match: a key of ``RULES``.
        group: counted apart.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    answers: tuple[str, ...]
    match: str
    group: str


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .!\"'`")


def _exact(text: str, answer: str) -> bool:
    return _plain(text) == _plain(answer)


def _contains(text: str, answer: str) -> bool:
    words = re.escape(_plain(answer))
    return re.search(rf"(?<!\w){words}(?!\w)", _plain(text)) is not None


def _number(text: str) -> Decimal | None:
    """Return the number that a text ends with, a boxed one first."""
    boxed = _BOXED.findall(text)
    found = _NUMBER.findall(boxed[-1] if boxed else text)
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


def _same_number(text: str, answer: str) -> bool:
    said, wanted = _number(text), _number(answer)
    return said is not None and said == wanted


def _regex(text: str, answer: str) -> bool:
    return re.search(answer, text) is not None


RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": _exact,
    "contains": _contains,
    "number": _same_number,
    "regex": _regex,
}
"""exact: the same text but for case, white space and marks around it. contains: as whole words.
number: the last number said, or the last boxed one, is the same. regex: found anywhere."""


def is_right(task: Task, text: str) -> bool:
    """Return whether a text answers a task."""
    return any(RULES[task.match](text, answer) for answer in task.answers)


def read_tasks(path: Path, match: str = "exact") -> list[Task]:
    """Read a file of tasks.

    Args:
        path: JSONL.
        match: the rule of lines that name none.

    Raises:
        ValueError: a line is malformed; the message names it.
    """
    tasks: dict[str, Task] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"--tasks {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line), line, match)
        except ValueError as error:
            raise ValueError(f"--tasks {path}, line {number}: {error}") from error
        if task.id in tasks:
            raise ValueError(f"--tasks {path}, line {number}: the id {task.id!r} was there before")
        tasks[task.id] = task
    if not tasks:
        raise ValueError(f"--tasks {path}: no task in it")
    return list(tasks.values())


def _task(row: Any, line: str, match: str) -> Task:
    if not isinstance(row, dict):
        raise ValueError("an object is needed")
    if "prompt" in row:
        row = row | {"messages": [{"role": "user", "content": row["prompt"]}]}
    dialogue = read_dialogue(row)
    rule = row.get("match", match)
    if rule not in RULES:
        raise ValueError(f"match {rule!r} is none of {', '.join(RULES)}")
    answers = _answers(row)
    if rule == "regex":
        for answer in answers:
            try:
                re.compile(answer)
            except re.error as error:
                raise ValueError(f"answer {answer!r} is no regular expression: {error}") from error
    elif rule == "number" and any(_number(answer) is None for answer in answers):
        raise ValueError(f"answer {answers} has no number in it")
    name = hashlib.blake2b(line.encode(), digest_size=8).hexdigest()
    group = str(row.get("group", ""))
    if group in ("all", "ungrouped"):
        raise ValueError(f"group {group!r}: the report uses that name itself")
    return Task(str(row.get("id", name)), dialogue.messages, dialogue.tools, answers, rule, group)


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    given = row.get("answers", row.get("answer"))
    answers = given if isinstance(given, list) else [given]
    if not answers or not all(isinstance(one, str | int | float) for one in answers):
        raise ValueError("answer, or answers, is needed: a text or a number, or a list of them")
    return tuple(map(str, answers))


def groups_of(tasks: Sequence[Task]) -> list[str]:
    """Return the groups in the order in which they come."""
    return list(dict.fromkeys(task.group for task in tasks))
