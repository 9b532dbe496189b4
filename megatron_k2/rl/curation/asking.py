"""One answer to one task, for measuring: environment and engine, no ledger.

Turns are rendered anew each time, which training must not do and a measurement may. A guess is
asked for at once, with few tokens; an answer that reasons or calls tools is no guess.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from megatron_k2.chat.format import ChatFormat, Message
from megatron_k2.engine.base import Completion, Engine, EngineFull, Request, Sampling, generate
from megatron_k2.gym.base import Answer, Environment, Task, Verdict, judged, unjudged

GUESS = "Answer at once with the final answer alone, in the form asked for: no reasoning, no steps."
MAX_TURNS = 64
WAIT_S, WAITS = 0.1, 600  # of a full engine: a minute in all


@dataclass(frozen=True)
class Rules:
    """How an answer is sampled.

    Attributes:
        temperature, top_p: of the sampler.
        max_tokens: of an episode, besides the task's own budget.
        guess: ask for the answer without reasoning.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    guess: bool = False


@dataclass
class Played:
    """What became of it; ``text`` is the last answer, for people."""

    verdict: Verdict
    tokens: int = 0
    text: str = ""


@dataclass
class _Dialogue:
    """Where an episode stands."""

    messages: list[Message]
    tools: list[Any]
    left: int
    tokens: int = 0
    text: str = ""


async def play(
    env: Environment,
    task: Task,
    engine: Engine,
    chat_format: ChatFormat,
    rules: Rules,
    seed: int,
    name: str,
) -> Played:
    """Play an episode; whatever the environment raises is a verdict of ``error``.

    Args:
        env: for this episode alone; closed here.
        task: to answer.
        engine: that answers.
        chat_format: of its model.
        rules: of sampling.
        seed: of environment and sampling.
        name: of requests, unique among those under way.

    Raises:
        RuntimeError: the engine fails: nothing was measured.
    """
    talk = _Dialogue([], [], min(rules.max_tokens, task.budget or type(env).budget))
    try:
        seen = await _safely(env.reset(task, seed))
        if isinstance(seen, Verdict):
            return Played(seen)
        talk.messages, talk.tools = list(seen.messages), list(seen.tools)
        if rules.guess:
            talk.messages = _asked_to_guess(talk.messages)
        for turn in range(MAX_TURNS):
            answer = await _answer(talk, engine, chat_format, rules, seed + turn, f"{name}-{turn}")
            if isinstance(answer, Verdict):
                return Played(answer, talk.tokens, talk.text)
            step = await _safely(env.step(answer))
            if isinstance(step, Verdict):
                return Played(step, talk.tokens, talk.text)
            if step.terminated or step.truncated:
                verdict = step.verdict or unjudged("the environment ended without a verdict")
                return Played(verdict, talk.tokens, talk.text)
            talk.messages += [answer.message, *step.messages]
        return Played(judged(0.0, f"no end after {MAX_TURNS} turns"), talk.tokens, talk.text)
    finally:
        await _safely(env.close())


async def _answer(
    talk: _Dialogue,
    engine: Engine,
    chat_format: ChatFormat,
    rules: Rules,
    seed: int,
    name: str,
) -> Answer | Verdict:
    """Return the next answer, or the verdict where none can be had."""
    try:
        prompt = tuple(chat_format.encode(talk.messages, talk.tools or None))
    except ValueError as error:
        return unjudged(f"the chat format cannot say it: {error}")
    room = min(talk.left, engine.max_context - len(prompt))
    if room < 1 and talk.tokens == 0:
        return unjudged(f"a prompt of {len(prompt)} tokens leaves no room for an answer")
    if room < 1:
        return judged(0.0, "budget or context were used up")
    sampling = Sampling(
        room, rules.temperature, rules.top_p, seed=seed, stop_ids=tuple(chat_format.stop_ids)
    )
    completion = await _patiently(engine, Request(name, prompt, sampling))
    reader = chat_format.parser(talk.messages, talk.tools or None)
    reader.feed(completion.ids)
    parsed = reader.finish()[1]
    talk.text = str(parsed.message.get("content") or "")
    talk.tokens += len(completion.ids)
    talk.left -= len(completion.ids)
    if rules.guess and (
        parsed.message.get("reasoning_content") or parsed.message.get("tool_calls")
    ):
        return judged(0.0, "no guess: it reasoned or called a tool")
    cut = completion.finish_reason != "stop"
    return Answer(talk.text, parsed.message, parsed.problems, truncated=cut)


async def _patiently(engine: Engine, request: Request) -> Completion:
    for _ in range(WAITS):
        try:
            completion = await generate(engine, request)
        except EngineFull:
            await asyncio.sleep(WAIT_S)
            continue
        if completion.finish_reason == "abort":
            raise RuntimeError("the engine aborted a request")
        return completion
    raise RuntimeError(f"the engine stayed full for {WAITS * WAIT_S:.0f} s")


async def _safely(work: Any) -> Any:
    """Return what an environment's method returns, or a verdict of why it did not."""
    try:
        return await work
    except TimeoutError as error:
        return unjudged(f"TimeoutError: {error}", "timeout")
    except Exception as error:  # whatever an environment raises ends one episode
        return unjudged(f"{type(error).__name__}: {error}")


def _asked_to_guess(messages: list[Message]) -> list[Message]:
    *before, last = messages
    return [*before, {**last, "content": f"{last.get('content') or ''}\n\n{GUESS}"}]
