"""Answers by the hash of their questions: what was paid for once is never asked again.

A recording is a journal (``megatron_k2/journal.py``) that one process writes, so a run has one for
each of its parts. What a model refused for good is recorded too: a replay drops the same records.
All that records say of who answered is in a recording, so a replay gives the same bytes whatever
``--model`` names. A replay without a model stops at a question that is not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_k2.agentic.model import Model, NotRecorded, Question, Refused, Reply
from megatron_k2.data.rephrase.parts import write_json
from megatron_k2.journal import CheckedLines, read_lines

type Answers = dict[str, Mapping[str, Any]]  # of Question.key -> its line
MODELS = "models.json"  # beside recordings: role -> model of the run
SHOWN = 60  # characters of a question that is not recorded


class Recording:
    """Answers that are known, and a journal for new ones.

    Args:
        path: of the journal, whose answers are known too; None keeps none.
        known: more answers, of ``read_recordings``.
    """

    def __init__(self, path: Path | None = None, known: Answers | None = None) -> None:
        self._lines = CheckedLines(path) if path is not None else None
        self._given: Answers = known or {}
        before = self._lines.before if self._lines is not None else []
        self._own: Answers = {line["key"]: line for line in before}

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Return the line of a key, None where there is none."""
        return self._own.get(key) or self._given.get(key)

    def keep(self, line: dict[str, Any]) -> Mapping[str, Any]:
        """Keep a new line; return what is known under its key, which another may have had first."""
        if (found := self.find(line["key"])) is not None:
            return found
        if self._lines is not None:
            self._lines.append(line, to_disk=False)
            self._own[line["key"]] = line
        return line

    def release(self) -> None:
        """Flush the journal and let another process have it."""
        if self._lines is not None:
            self._lines.close()


class RecordedModel:
    """What a model said, and says to new questions.

    Args:
        model: asked what is not known; None: that is ``NotRecorded``, no answer is invented.
        recording: what is known, and where new answers are kept.
        where: stage and step, for that error.
    """

    def __init__(self, model: Model | None, recording: Recording, where: str = "") -> None:
        self._model, self._recording, self._where = model, recording, where

    async def ask(self, question: Question) -> Reply:
        """Return the recorded answer, or have one and record it; raises as ``model.Model``."""
        key = question.key
        line = self._recording.find(key)
        if line is None:
            if self._model is None:
                raise NotRecorded(self._missing(question))
            try:
                new = to_line(question, key, await self._model.ask(question))
            except Refused as error:
                new = {"key": key, "kind": question.kind, "refused": str(error)}
            line = self._recording.keep(new)
        if "refused" in line:
            raise Refused(line["refused"])
        return Reply(
            line["message"],
            line["prompt_tokens"],
            line["completion_tokens"],
            line["model"],
            line.get("planted", ""),
        )

    async def close(self) -> None:
        """Release the journal and close the model."""
        self._recording.release()
        if self._model is not None:
            await self._model.close()

    def _missing(self, question: Question) -> str:
        """Return what a replay lacks, and what to do about it."""
        last = " ".join(str(question.messages[-1].get("content") or "").split())
        where = f" in the {self._where}" if self._where else ""
        return (
            f"--replay: no answer is recorded to question {question.key} of the role "
            f"{question.kind}{where}, which ends {json.dumps(last[-SHOWN:], ensure_ascii=False)}; "
            "give the flags of the recorded run, or --model to have it asked"
        )


def to_line(question: Question, key: str, reply: Reply) -> dict[str, Any]:
    """Return a recording's line of an answer."""
    return {
        "key": key,
        "kind": question.kind,
        "message": dict(reply.message),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "model": reply.model,
        **({"planted": reply.planted} if reply.planted else {}),
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
        if not all("key" in line and line.keys() & {"message", "refused", "ids"} for line in lines):
            raise ValueError(f"--replay {path}: is no recording of answers")
        if not lines:
            raise ValueError(f"--replay {path}: has no recorded answer")
        found.update((line["key"], line) for line in lines)
    return found


def write_models(folder: Path, names: Mapping[str, str]) -> None:
    """Note beside a run's recordings which model each role had: role -> name."""
    write_json(folder / MODELS, dict(sorted(names.items())))


def read_models(paths: Iterable[Path]) -> dict[str, str]:
    """Return role -> name of the model that ``write_models`` noted beside recordings.

    Raises:
        ValueError: a note is damaged; names it.
    """
    found: dict[str, str] = {}
    for path in paths:
        note = (path if path.is_dir() else path.parent) / MODELS
        try:
            found |= json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"--replay {note}: is damaged ({error})") from error
    return found
