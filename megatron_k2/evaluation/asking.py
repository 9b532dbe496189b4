"""Asks a server all questions, a bounded number at once, and never twice.

The client is OpenAI's own (extra ``eval``), which retries what passes by itself. Every answer is
a line of a journal, so that a killed run goes on; the results come out in the order of the tasks,
whoever answered first. A question that the server refuses for good is an error of that question,
counted as such, never as a wrong answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_k2.compat import optional
from megatron_k2.journal import CheckedLines, JournalBusy


@dataclass(frozen=True)
class Server:
    """Where a model is; the key is read from an environment variable and stored nowhere."""

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 600.0
    retries: int = 6


@dataclass(frozen=True)
class Asking:
    """How each question is asked.

    Attributes:
        samples: answers a question; each has a seed of its own.
        temperature, top_p, max_tokens: of the sampler.
        seed: of the first sample.
        concurrency: requests under way.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 0
    concurrency: int = 16


@dataclass(frozen=True)
class Question:
    """What to ask; ``key`` is unique in the run."""

    key: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


@dataclass
class Said:
    """An answer: the message, why it ended, its tokens; or why there is none."""

    message: dict[str, Any]
    finish_reason: str
    tokens: int
    error: str = ""


def ask_all(
    questions: Sequence[Question],
    server: Server,
    asking: Asking,
    journal: Path,
    quiet: bool = False,
) -> list[list[Said]]:
    """Return the answers to each question, ``asking.samples`` each.

    Raises:
        ValueError: the package is missing, the journal is another run's, or the server refuses
            the key or the model.
        RuntimeError: the server answers nobody; the same command goes on.
    """
    try:
        optional("openai").require()
    except ImportError as error:
        raise ValueError(str(error)) from error
    return asyncio.run(_ask_all(questions, server, asking, journal, quiet))


async def _ask_all(
    questions: Sequence[Question], server: Server, asking: Asking, path: Path, quiet: bool
) -> list[list[Said]]:
    openai = importlib.import_module("openai")
    lines = _open(path, _identity(questions, server, asking))
    said = {one["key"]: Said(**one["said"]) for one in lines.before if "key" in one}
    client = openai.AsyncOpenAI(
        base_url=server.url,
        api_key=os.environ.get(server.key_env) or "none",
        timeout=server.timeout_s,
        max_retries=server.retries,
    )
    gate = asyncio.Semaphore(asking.concurrency)
    wanted = [
        (f"{one.key}/{sample}", one, asking.seed + sample)
        for one in questions
        for sample in range(asking.samples)
    ]
    with tqdm(total=len(wanted), initial=len(said), unit="answer", disable=quiet) as bar:

        async def one(key: str, question: Question, seed: int) -> None:
            async with gate:
                answer = await _ask(openai, client, question, server, asking, seed)
            said[key] = answer
            lines.append({"key": key, "said": asdict(answer)}, to_disk=False)
            bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for key, question, seed in wanted:
                    if key not in said:
                        group.create_task(one(key, question, seed))
        except* (ValueError, RuntimeError) as errors:
            raise errors.exceptions[0] from None
        finally:
            lines.close()
            await client.close()
    found = [said[key] for key, _, _ in wanted]
    return [found[at : at + asking.samples] for at in range(0, len(found), asking.samples)]


async def _ask(
    openai: Any, client: Any, question: Question, server: Server, asking: Asking, seed: int
) -> Said:
    body = {
        "model": server.model,
        "messages": question.messages,
        "temperature": asking.temperature,
        "top_p": asking.top_p,
        "max_tokens": asking.max_tokens,
        "seed": seed,
    }
    if question.tools:
        body["tools"] = question.tools
    try:
        answer = await client.chat.completions.create(**body)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise ValueError(f"{server.url} refuses the key in ${server.key_env}: {error}") from error
    except openai.NotFoundError as error:
        raise ValueError(f"--server {server.url}, --model {server.model}: {error}") from error
    except openai.APIConnectionError as error:
        raise RuntimeError(
            f"--server {server.url} does not answer ({error.__cause__ or error}); what was "
            "answered is kept, and the same command goes on"
        ) from error
    except openai.APIStatusError as error:
        if error.status_code >= 500 or error.status_code == 429:
            raise RuntimeError(
                f"--server {server.url}: {error}; what was answered is kept, and the same command "
                "goes on"
            ) from error
        return Said({}, "", 0, f"status {error.status_code}: {error.message}")
    choice = answer.choices[0]
    tokens = answer.usage.completion_tokens if answer.usage else 0
    return Said(choice.message.model_dump(exclude_none=True), choice.finish_reason or "", tokens)


def _open(path: Path, identity: str) -> CheckedLines:
    try:
        lines = CheckedLines(path)
    except JournalBusy as error:
        raise ValueError(f"--output: another run is writing {path}") from error
    if not lines.before:
        lines.append({"run": identity}, to_disk=True)
    elif lines.before[0].get("run") != identity:
        lines.close()
        raise ValueError(
            f"{path}: answers to other questions, or asked in another way; give another --output"
        )
    return lines


def _identity(questions: Sequence[Question], server: Server, asking: Asking) -> str:
    how = asdict(asking) | {"model": server.model, "url": server.url}
    del how["concurrency"]
    content = json.dumps([how, [asdict(one) for one in questions]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
