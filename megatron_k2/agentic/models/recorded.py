"""Answers by the hash of their questions: what was paid for once is never asked again.

A recording is a journal (``megatron_k2/journal.py``) that one process writes, so a run has one for
each of its parts. What a model refused for good is recorded too: a replay drops the same records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_k2.agentic.model import Model, Question, Refused, Reply
from megatron_k2.journal import CheckedLines, read_lines

type Answers = dict[str, Mapping[str, Any]]  # of Question.key -> its line


class RecordedModel:
    """What a model said, and says to new questions.

    Args:
        model: asked what is not known; None: that is ``Refused``, no answer is invented.
        path: journal in which new answers are kept, those in it are known; None keeps none.
        known: more answers, of ``read_recordings``.
    """

    def __init__(
        self, model: Model | None, path: Path | None = None, known: Answers | None = None
    ) -> None:
        self._model = model
        self._lines = CheckedLines(path) if path is not None else None
        self._given: Answers = known or {}
        before = self._lines.before if self._lines is not None else []
        self._own: Answers = {line["key"]: line for line in before}

    async def ask(self, question: Question) -> Reply:
        """Return the recorded answer, or have one and record it; raises as ``model.Model``."""
        key = question.key
        line = self._find(key)
        if line is None:
            if self._model is None:
                raise Refused(f"no answer is recorded to this question for the {question.kind}")
            try:
                line = to_line(question, key, await self._model.ask(question))
            except Refused as error:
                line = {"key": key, "kind": question.kind, "refused": str(error)}
            line = self._find(key) or self._keep(line)  # another may have asked it meanwhile
        if "refused" in line:
            raise Refused(line["refused"])
        return Reply(
            line["message"], line["prompt_tokens"], line["completion_tokens"], line["model"]
        )

    def release(self) -> None:
        """Flush the journal and let another process have it."""
        if self._lines is not None:
            self._lines.close()

    async def close(self) -> None:
        """Release the journal and close the model."""
        self.release()
        if self._model is not None:
            await self._model.close()

    def _find(self, key: str) -> Mapping[str, Any] | None:
        return self._own.get(key) or self._given.get(key)

    def _keep(self, line: dict[str, Any]) -> dict[str, Any]:
        if self._lines is not None:
            self._lines.append(line, to_disk=False)
            self._own[line["key"]] = line
        return line


def to_line(question: Question, key: str, reply: Reply) -> dict[str, Any]:
    """Return a recording's line of an answer."""
    return {
        "key": key,
        "kind": question.kind,
        "message": dict(reply.message),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "model": reply.model,
    }


def read_recordings(paths: Iterable[Path]) -> Answers:
    """Return the answers in recordings: files, or folders of ``*.jsonl``.

    Raises:
        ValueError: a path is missing, or has no answer; names it.
    """
    found: Answers = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"--replay {path}: not there")
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        lines = [line for file in files for line in read_lines(file)]
        if not all("key" in line and ("message" in line or "refused" in line) for line in lines):
            raise ValueError(f"--replay {path}: is no recording of answers")
        if not lines:
            raise ValueError(f"--replay {path}: has no recorded answer")
        found.update((line["key"], line) for line in lines)
    return found
