"""Judges: an OpenAI-compatible server, an engine of this process, recorded answers, a script.

Each answers messages with a text (``services.Judge``), and counts what happened to it; environments
ask through ``asking.ask_json``, which reads the text strictly.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_k2.chat.format import ChatFormat, Message
from megatron_k2.data.rephrase.client import ChunkRefused, Client, Endpoint, ServerGone, key_from
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.settings import Sampler
from megatron_k2.engine.base import Engine, EngineFull, Request, Sampling, generate
from megatron_k2.gym.services import Judge
from megatron_k2.journal import CheckedLines

FULL_TRIES, FULL_WAIT_S = 8, 0.05  # an engine that is full is asked again, waiting twice as long


class JudgeGone(RuntimeError):
    """Its server answers nobody: no later question is answered either."""


class Counting:
    """What every judge here counts: ``counts`` by what happened."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()


class EndpointJudge(Counting):
    """A model behind an OpenAI-compatible address, at temperature 0.

    Args:
        client: with its own gate, budget and tries; several judges may share those.
    """

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    @property
    def model(self) -> str:
        """Name that the server knows it by."""
        return self._client.endpoint.model

    async def ask(self, messages: Sequence[Message], seed: int, max_tokens: int = 512) -> str:
        """Return its answer; as ``services.Judge``.

        Raises:
            RuntimeError: this request is refused, or a budget is spent.
            JudgeGone: the server answers nobody; names its flag.
            ValueError: wrong address, key or model; all later requests fail alike.
        """
        asked = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        try:
            answer = await self._client.chat(asked, Sampler(0.0, 1.0, max_tokens), seed)
        except ChunkRefused as error:
            raise RuntimeError(f"the judge refused: {error}") from error
        except ServerGone as error:
            raise JudgeGone(f"{self._client.endpoint.flags[-1]}: {error}") from error
        return answer.text

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


def connect(
    url: str,
    model: str,
    key_env: str = "",
    concurrency: int = 16,
    timeout_s: float = 120.0,
    flags: tuple[str, str, str] = ("--judge-key-env", "--judge-model", "--judge-url"),
) -> EndpointJudge:
    """Return the judge of a server.

    Args:
        url: with the version, such as ``http://localhost:8000/v1``.
        model: its name there.
        key_env: environment variable that holds the key; "" for none.
        concurrency: requests under way at most.
        timeout_s: of one try.
        flags: of key, model and address, which errors name.
    """
    key = key_from(key_env) if key_env else ""
    endpoint = Endpoint(url, model, key, timeout_s, flags=flags)
    return EndpointJudge(Client(endpoint, Gate(concurrency), Budget(), max_tries=4))


class EngineJudge(Counting):
    """The weights of an engine of this process: the policy itself, or a frozen copy.

    Args:
        engine: that generates.
        chat_format: of its model.
        name: for the record; the version of the weights is added.
    """

    def __init__(self, engine: Engine, chat_format: ChatFormat, name: str = "policy") -> None:
        super().__init__()
        self._engine, self._format, self._name = engine, chat_format, name
        self._numbers = itertools.count()

    @property
    def model(self) -> str:
        """Name and version of the weights."""
        return f"{self._name}@{self._engine.weight_version}"

    async def ask(self, messages: Sequence[Message], seed: int, max_tokens: int = 512) -> str:
        """Return the most probable answer, without its reasoning; as ``services.Judge``.

        Raises:
            RuntimeError: the question is too long, or the engine stays full.
        """
        prompt = tuple(self._format.encode(messages, add_generation_prompt=True))
        room = self._engine.max_context - len(prompt)
        sampling = Sampling(
            max(1, min(max_tokens, room)), 0.0, seed=seed, stop_ids=self._format.stop_ids
        )
        request = Request(f"judge-{id(self):x}-{next(self._numbers)}", prompt, sampling)
        for attempt in range(FULL_TRIES):
            try:
                completion = await generate(self._engine, request)
                break
            except EngineFull:
                await asyncio.sleep(FULL_WAIT_S * 2**attempt)
            except ValueError as error:
                raise RuntimeError(f"the judge cannot be asked this: {error}") from error
        else:
            raise RuntimeError(f"the judge's engine was full {FULL_TRIES} times")
        if completion.finish_reason == "abort":
            raise RuntimeError("the judge's engine aborted the request")
        parser = self._format.parser(messages)
        parser.feed(completion.ids)
        _, parsed = parser.finish()
        return str(parsed.message.get("content") or "")


class RecordedJudge(Counting):
    """What a judge said, by the hash of what it was asked; and what it says to new questions.

    Args:
        path: journal of answers, for one process at a time.
        judge: asked what is not in it; None: that is a ``RuntimeError``, no answer is invented.
        model: name of the judge whose answers they are, where there is none to ask.
    """

    def __init__(self, path: Path, judge: Judge | None = None, model: str = "") -> None:
        super().__init__()
        self._judge, self._model = judge, model
        self._lines = CheckedLines(path)
        self._known: dict[str, str] = {line["key"]: line["text"] for line in self._lines.before}

    @property
    def model(self) -> str:
        """Name of the judge whose answers they are."""
        return self._judge.model if self._judge is not None else self._model

    async def ask(self, messages: Sequence[Message], seed: int, max_tokens: int = 512) -> str:
        """Return the recorded answer, or have one and record it; as ``services.Judge``."""
        key = question_hash(self.model, messages, seed, max_tokens)
        if key not in self._known:
            if self._judge is None:
                raise RuntimeError(f"no answer is recorded to {str(messages[-1])[:120]}")
            text = await self._judge.ask(messages, seed, max_tokens)
            if key not in self._known:  # another may have asked it meanwhile
                self._lines.append({"key": key, "text": text}, to_disk=False)
                self._known[key] = text
        return self._known[key]

    def close(self) -> None:
        """Flush the journal and let another process have it."""
        self._lines.close()


class ScriptedJudge(Counting):
    """Answers by a function, for tests.

    Args:
        answer: of the messages and the seed.
        model: its name for the record.
    """

    def __init__(
        self, answer: Callable[[Sequence[Message], int], str], model: str = "scripted"
    ) -> None:
        super().__init__()
        self._answer, self._model = answer, model

    @property
    def model(self) -> str:
        """Its name for the record."""
        return self._model

    async def ask(self, messages: Sequence[Message], seed: int, max_tokens: int = 512) -> str:
        """Return what the function says."""
        return self._answer(messages, seed)


def question_hash(model: str, messages: Sequence[Message], seed: int, max_tokens: int) -> str:
    """Return what tells a question apart."""
    asked = [model, [dict(message) for message in messages], seed, max_tokens]
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
