"""The policy on an engine of this process: ``--model-for policy=engine:PATH``.

Opened once a process, by the first dialogue: Megatron's checkpoints by the local engine, a Hugging
Face folder by transformers, with a tokenizer that has Kimi's chat format. Other roles ask servers:
``tools/serve.py`` makes one of the same folder. A checkpoint is opened by what the tool passes
(``training`` is a higher floor).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_k2.agentic.models.recorded_engine import RecordedEngine
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.trajectories.engine_policy import EnginePolicy
from megatron_k2.chat.format import ChatFormat
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.engine.base import Engine

ENGINE = "engine:"
type OpenCheckpoint = Callable[[str, argparse.Namespace], tuple[Engine, ChatFormat]]


def engine_name(spec: str) -> str:
    """Return the name of the model of ``engine:PATH``, for records.

    Raises:
        ValueError: there is nothing at the path.
    """
    path = Path(spec.removeprefix(ENGINE))
    if not spec.removeprefix(ENGINE) or not path.exists():
        raise ValueError(f"--model-for policy={spec}: there is no such folder")
    return f"{ENGINE}{path.resolve().name}"


def engine_spec(args: argparse.Namespace) -> str:
    """Return ``engine:PATH`` where an engine plays the policy, "" otherwise."""
    given = [one.partition("=")[2] for one in args.model_for if one.startswith(f"policy={ENGINE}")]
    return given[-1] if given else ""


async def engine_policy(desk: Desk, spec: str) -> EnginePolicy:
    """Return the policy of a dialogue; its answers are recorded like those of other models.

    Raises:
        ValueError: the folder cannot be opened, or its tokenizer has no format of Kimi's.
    """

    async def make() -> tuple[Engine, KimiFormat]:
        return _opened(desk, spec)

    async def close(made: tuple[Engine, KimiFormat]) -> None:
        await made[0].close()

    engine, chat_format = await desk.hold("engine", make, close)
    name = engine_name(spec)
    recorded = RecordedEngine(engine, desk.recording, name)
    return EnginePolicy(recorded, chat_format, desk.args.temperature, name=name, keeps_ledger=True)


def _opened(desk: Desk, spec: str) -> tuple[Engine, KimiFormat]:
    from megatron_k2.engine.server.models import is_megatron_checkpoint, open_with_transformers

    path, args = spec.removeprefix(ENGINE), desk.args
    wanted = argparse.Namespace(
        tokenizer=str(args.engine_tokenizer or ""),
        chat_format="kimi-k2",
        max_running=args.concurrency,
    )
    try:
        if not is_megatron_checkpoint(path):
            engine, found = open_with_transformers(
                path, wanted.tokenizer, wanted.chat_format, wanted.max_running
            )
        elif desk.open_checkpoint is None:
            raise ValueError("only megatron-k2 synthesize-agentic opens checkpoints")
        else:
            engine, found = desk.open_checkpoint(path, wanted)
    except ValueError as error:
        raise ValueError(f"--model-for policy={spec}: {error}") from error
    if not isinstance(found, KimiFormat):
        raise ValueError(f"--model-for policy={spec}: the tokenizer has no format of Kimi's")
    return engine, found
