r"""Mathematics with a known answer: files of problems, and a small procedural set.

The answer is the last ``\boxed{}``, or the last line after ``####`` (GSM8K) or ``Answer:`` where
there is none: one candidate, so that listing many gains nothing. Equality is math-verify's, in a
worker. Where the gold answer is a number, so must the answer be: ``12 \times 13`` for 156 repeats
the question. Kimi K2 and K1.5 leave out what can be guessed (arXiv 2501.12599, 2.1): true or false,
multiple choice, proofs; so should the files.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.mathematics_problems import problems
from megatron_k2.gym.splits import content_hash, distinct

CHECK = "megatron_k2.gym.mathematics_check:equal"
INSTRUCTION = "Put your final answer in \\boxed{}."
DEFAULT_NUM_TASKS = 200
_MAX_ANSWER = 400  # characters; golds of GSM8K, MATH and NuminaMath are shorter
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LINE = re.compile(
    r"^\W*(?:####|(?:the\s+)?(?:final\s+)?answer(?:\s+is)?)[\s:*]+(.+?)\s*$", re.I | re.M
)
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_FRACTION = rf"(?:{_DIGITS}/{_DIGITS}|\d*\\[dt]?frac\{{?-?\d+\}}?\{{?-?\d+\}}?)"
_SCIENTIFIC = rf"{_DIGITS}(?:\\times|\\cdot)10\^(?:\{{-?\d+\}}|\d)"
_NUMBER = re.compile(rf"[-+]?(?:{_SCIENTIFIC}|{_FRACTION}|{_DIGITS})(?:\\?%|\^\{{?\\circ\}}?)?")
_UNIT = re.compile(r"(?<=\d)[a-zA-Z]+\.?$")
_DRESS = re.compile(r"\\text\{[^{}]*\}|\\mathrm\{[^{}]*\}|\\[,;! ]|\\\$|[$€£\s]|^[a-zA-Z]\s*=")


class Mathematics(SingleTurn):
    """Problems whose answer is an expression, a set or an interval."""

    name = "mathematics"
    needs = ("verifiers",)

    @classmethod
    def load(
        cls, split: str, num_tasks: int | None = None, seed: int = 0, file: str = ""
    ) -> Sequence[Task]:
        """Return the problems of a file, see ``read_problems``, or procedural ones.

        Args:
            split: ``train`` or ``test``.
            num_tasks: at most so many; None: all of a file, ``DEFAULT_NUM_TASKS`` without one.
            seed: of procedural problems.
            file: JSONL.
        """
        if file:
            return read_problems(Path(file), split, num_tasks)
        count = DEFAULT_NUM_TASKS if num_tasks is None else num_tasks
        rows = distinct(problems(seed), lambda row: row["problem"], split, count)
        return [_task(row) for row in rows]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the gold answer in a box."""
        return (Answer(f"\\boxed{{{task.metadata['answer']}}}"),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Judge the last answer of the text."""
        gold = str(task.metadata["answer"])
        found = final_answer(answer.text)
        if found is None or not found or len(found) > _MAX_ANSWER:
            return judged(0.0, f"expected {gold}; no final answer that can be read")
        refusal = form_problem(gold, found, task.metadata.get("form", ""))
        if refusal:
            return judged(0.0, f"expected {gold}, got {found}: {refusal}")
        assert self.services.verifiers is not None  # ``needs``
        right = await self.services.verifiers.call(CHECK, gold, found)
        return judged(float(right), f"expected {gold}, got {found}", backend="math-verify")


def final_answer(text: str) -> str | None:
    """Return the content of the last box, or of the last answer line; None where there is none."""
    boxes = list(_BOX.finditer(text))
    if boxes:
        return _braced(text[boxes[-1].end() :])
    lines = _LINE.findall(text)
    return lines[-1].strip("*` ").removesuffix(".") if lines else None


def form_problem(gold: str, answer: str, form: str = "") -> str:
    """Return why the form of an answer makes it none; empty where it does not.

    Args:
        gold: a number must be answered by a number, a whole one by no fraction.
        answer: given.
        form: of the answer: ``expanded`` has no brackets, derivatives or integrals.
    """
    bare, given = _DRESS.sub("", gold), _DRESS.sub("", answer)
    if _NUMBER.fullmatch(bare):
        if given.count("=") > 1 or not _NUMBER.fullmatch(_UNIT.sub("", given.rpartition("=")[2])):
            return "not a number"
        if bare.replace(",", "").lstrip("-").isdigit() and ("/" in given or "frac" in given):
            return "a fraction for a whole number"
    if form == "expanded" and re.search(r"[(\[]|\\(?:int|frac\{d|partial|prime)|'", given):
        return "not expanded"
    return ""


def read_problems(path: Path, split: str, num_tasks: int | None = None) -> list[Task]:
    r"""Return the problems of a JSONL file (or .jsonl.gz) that belong to a split.

    Args:
        path: a line each. ``problem`` or ``question``; ``answer``, of which what follows ``####``
            counts if that is there (GSM8K); without it the last box of ``solution`` (MATH).
            ``tags`` is optional.
        split: a problem's text decides its split; ``splits`` says how.
        num_tasks: the first so many; None: all.

    Raises:
        ValueError: the file cannot be read, or a line is none of these; names the line.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = list(_rows(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    found = distinct(rows, lambda row: row["problem"], split, None)
    return [_task(row) for row in found[:num_tasks]]


def _rows(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = row.get("problem") or row["question"]
            answer = row.get("answer")
            if answer is None:
                answer = final_answer(row["solution"])
            answer = str(answer).rpartition("####")[2].strip()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: not a problem with an answer ({error!r})"
            ) from error
        if not answer or answer == "None":
            raise ValueError(f"{path}, line {number}: no answer")
        yield {
            "problem": str(problem),
            "answer": answer,
            "tags": [*row.get("tags", ()), f"source:{path.name}"],
        }


def _task(row: Mapping[str, Any]) -> Task:
    metadata = {"answer": row["answer"]}
    if row.get("form"):
        metadata["form"] = row["form"]
    return Task(
        id=content_hash(row["problem"]),
        env=Mathematics.name,
        messages=({"role": "user", "content": f"{row['problem']}\n{INSTRUCTION}"},),
        metadata=metadata,
        tags=("domain:mathematics", *row["tags"]),
    )


def _braced(text: str) -> str | None:
    """Return what stands before the brace that closes one already open; None: nothing does."""
    depth, escaped = 1, False
    for place, letter in enumerate(text):
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif letter in "{}":
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return text[:place].strip()
    return None
