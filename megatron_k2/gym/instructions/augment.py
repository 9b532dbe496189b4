"""Instructions that a model proposes, with a check that it writes: after AutoIF (arXiv 2406.13542).

For each proposal the model writes several checks, each with answers that must pass or fail. Checks
vote on the cases and cases on the checks: a case stays if most checks agree with its label, a check
stays if it agrees with every case that stayed. The model is then asked, without the
instruction, what the check asks for, and whether that is the same. What does not come through is
counted by reason. Left out: AutoIF's web of response sampling; the answers are the policy's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_k2.gym.asking import ask_json, field_of
from megatron_k2.gym.instructions.code_check import run_check
from megatron_k2.gym.judging import JudgeGone
from megatron_k2.gym.sandbox.base import Sandbox, SandboxError
from megatron_k2.gym.services import Judge

NUM_CHECKS = 3  # of a proposal, by one model with different seeds; AutoIF: several a proposal
LEAST_CASES = 2  # of either label that must stay
MAX_TOKENS = 2048
PROPOSE = (
    "Propose one new instruction about the form of an answer that a short Python function can "
    "check exactly from the answer's text alone. It must fit any request and differ from the "
    'examples. Answer with one JSON object: {"instruction": "..."}'
)
WRITE = (
    "Write a Python function `def check(answer: str) -> bool` that returns whether an answer "
    "follows the instruction. Use the standard library only. Then give at least two answers that "
    "follow it and two that nearly do but not quite. Answer with one JSON object: "
    '{"source": "...", "follow": ["..."], "fail": ["..."]}'
)
DESCRIBE = (
    "Describe in one sentence what this Python function requires of an answer. Answer with one "
    'JSON object: {"instruction": "..."}'
)
SAME = (
    "Do these two instructions ask for the same, so that an answer follows the first exactly if "
    'it follows the second? Answer with one JSON object: {"same": true or false}'
)


@dataclass(frozen=True)
class Written:
    """A check and its cases, as a model wrote them."""

    source: str
    follow: tuple[str, ...]
    fail: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """An instruction that came through: what an expert file's ``checks`` and ``gold`` hold.

    Attributes:
        text: the instruction.
        source: of its check.
        follow, fail: answers that pass and fail it.
        votes: checks that agreed on all of them, and how many were written.
    """

    text: str
    source: str
    follow: tuple[str, ...]
    fail: tuple[str, ...]
    votes: tuple[int, int]

    def as_task(self, request: str) -> dict[str, Any]:
        """Return an expert file's task of it."""
        check = {"text": self.text, "source": self.source}
        return {"request": request, "checks": [check], "gold": self.follow[0]}

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


async def augment(
    model: Judge, sandbox: Sandbox, examples: Sequence[str], num_proposals: int, seed: int
) -> tuple[list[Checked], Counter[str]]:
    """Return the instructions that came through, and what became of the proposals.

    Args:
        model: that proposes, writes and compares.
        sandbox: for its code.
        examples: instructions to differ from.
        num_proposals: how many to ask for.
        seed: the same gives the same questions.

    Raises:
        SandboxError: the sandbox fails.
        JudgeGone: the model's server answers nobody.
    """
    outcomes: Counter[str] = Counter()
    kept: list[Checked] = []
    known = {_plain(example) for example in examples}
    for number in range(num_proposals):
        shown = [*examples, *(one.text for one in kept)]
        try:
            text = await _text(model, PROPOSE, {"examples": shown}, seed + 1000 * number)
            if _plain(text) in known:
                outcomes["known"] += 1
                continue
            known.add(_plain(text))
            found, outcome = await _cross_validated(model, sandbox, text, seed + 1000 * number)
        except (SandboxError, JudgeGone):
            raise
        except (RuntimeError, TimeoutError):  # the model gave nothing that can be read
            found, outcome = None, "no answer"
        outcomes[outcome] += 1
        if found is not None:
            kept.append(found)
    return kept, outcomes


async def _cross_validated(
    model: Judge, sandbox: Sandbox, text: str, seed: int
) -> tuple[Checked | None, str]:
    """Return the instruction with its best check, or None and why."""
    written = await asyncio.gather(
        *(
            ask_json(model, WRITE, {"instruction": text}, _read, seed + 10 * number, MAX_TOKENS)
            for number in range(1, NUM_CHECKS + 1)
        ),
        return_exceptions=True,
    )
    for one in written:
        if isinstance(one, JudgeGone | ValueError):  # the server, or how it is asked
            raise one
    checks = [one for one in written if isinstance(one, Written)]
    cases: dict[str, bool] = {}
    for one in checks:
        for label, said in ((True, one.follow), (False, one.fail)):
            cases |= {answer: label for answer in said if cases.get(answer, label) == label}
    if len(checks) < 2:
        return None, "too few checks"
    answers = list(cases)
    verdicts = [await _verdicts(sandbox, one.source, answers) for one in checks]
    stayed = [
        number
        for number, answer in enumerate(answers)
        if 2 * sum(one[number] == cases[answer] for one in verdicts) > len(checks)
    ]
    follow = tuple(answers[number] for number in stayed if cases[answers[number]])
    fail = tuple(answers[number] for number in stayed if not cases[answers[number]])
    if min(len(follow), len(fail)) < LEAST_CASES:
        return None, "too few cases"
    agreeing = [
        check
        for check, one in zip(checks, verdicts, strict=True)
        if all(one[number] == cases[answers[number]] for number in stayed)
    ]
    if 2 * len(agreeing) <= len(checks):
        return None, "checks disagree"
    source = min((check.source for check in agreeing), key=len)
    described = await _text(model, DESCRIBE, {"source": source}, seed + 100)
    fields = {"first": text, "second": described}
    if not await ask_json(model, SAME, fields, lambda v: field_of(v, "same", bool), seed + 200):
        return None, "means another thing"
    return Checked(text, source, follow, fail, (len(agreeing), len(checks))), "kept"


async def _verdicts(sandbox: Sandbox, source: str, answers: list[str]) -> list[bool | None]:
    """Return what a check says of each case; nothing where it does not end or crashes."""
    try:
        return await run_check(sandbox, source, answers)
    except SandboxError:
        raise
    except (TimeoutError, RuntimeError):
        return [None] * len(answers)


async def _text(model: Judge, instruction: str, fields: dict[str, Any], seed: int) -> str:
    def read(value: dict[str, Any]) -> str:
        text = field_of(value, "instruction", str).strip()
        if not text:
            raise ValueError("instruction is empty")
        return text

    return await ask_json(model, instruction, fields, read, seed)


def _read(value: dict[str, Any]) -> Written:
    """Read a check and its cases.

    Raises:
        ValueError: fields are missing or of another type.
    """
    lists = []
    for name in ("follow", "fail"):
        answers = field_of(value, name, list)
        if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
            raise ValueError(f"{name} has no answers")
        lists.append(tuple(answers))
    return Written(field_of(value, "source", str), *lists)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
