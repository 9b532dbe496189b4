"""The Megatron model behind HTTP: a small K2 with random weights, in Kimi's format."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.engine.base import Completion, Request, Sampling, generate
from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.local import LocalEngine
from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.engine.scheduler import Limits
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service
from tests.unit.chat.kimi_files import write_tokenizer
from tests.unit.engine.scripted_engine import serving
from tests.unit.engine.small_models import randomise_
from tests.unit.engine.small_models import run as run_core
from tests.unit.engine.test_openai_client import TOOLS, message_of
from tests.unit.model.tiny import build_model, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
LIMITS = Limits(max_context=512, cache_tokens=2048, max_running=8, step_tokens=128)
PROMPTS = [(5, 6, 7), (8,) * 20, (9, 10)]


class Served:
    """A live server and what stands behind it."""

    def __init__(self, url: str, core: LocalCore, engine: LocalEngine, chat: KimiFormat) -> None:
        self.url, self.core, self.engine, self.chat = url, core, engine, chat


@pytest.fixture(scope="module")
def served(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    chat = KimiFormat.load(write_tokenizer(tmp_path_factory.mktemp("kimi")))
    model = randomise_(build_model(tiny_config(), chat.tokenizer.vocab_size), 0)
    core = LocalCore(model, LIMITS)
    engine = LocalEngine(core)
    with serving(make_app(Service(engine, chat, "k2"))) as url:
        yield Served(url, core, engine, chat)


def test_ids_and_log_probs_over_http_are_the_engines_own(served: Served) -> None:
    requests = [
        Request(f"r{seed}", prompt, Sampling(12, seed=seed, top_log_probs=2))
        for seed, prompt in enumerate(PROMPTS)
    ]

    async def ask() -> list[Completion]:
        engine = await OpenAIEngine.connect(served.url)
        done = await asyncio.gather(*(generate(engine, request) for request in requests))
        await engine.close()
        return list(done)

    remote = asyncio.run(ask())
    local = run_core(served.core, requests)
    for answer in remote:
        own = local[answer.request.id]
        assert answer.ids == own.ids
        assert answer.versions == own.versions
        # Batches differ, and with them the order of sums.
        assert answer.log_probs == pytest.approx(own.log_probs, abs=1e-5)


def test_openais_client_streams_a_chat_with_tools(served: Served) -> None:
    user: Any = [{"role": "user", "content": "Hi"}]
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        ask: dict[str, Any] = dict(
            model="k2", messages=user, tools=TOOLS, max_tokens=20, temperature=0
        )
        whole = client.chat.completions.create(**ask, extra_body={"return_token_ids": True})
        message, reason = message_of(client.chat.completions.create(**ask, stream=True))
        prompt = whole.prompt_token_ids
    assert prompt == served.chat.encode(user, TOOLS)
    assert len(whole.choices[0].token_ids) <= 20
    assert message["content"] == (whole.choices[0].message.content or "")
    assert reason == whole.choices[0].finish_reason


def test_requests_whose_clients_leave_free_their_cache(served: Served) -> None:
    roll = random.Random(0)

    async def leave(engine: OpenAIEngine, name: str) -> None:
        pieces = engine.stream(Request(name, roll.choice(PROMPTS), Sampling(100)))
        for _ in range(roll.randrange(1, 5)):
            await anext(pieces)
        await pieces.aclose()

    async def ask() -> None:
        engine = await OpenAIEngine.connect(served.url)
        await asyncio.gather(*(leave(engine, str(name)) for name in range(24)))
        await engine.close()

    asyncio.run(ask())
    until = time.monotonic() + 10
    while (served.engine.num_requests or served.core.has_work) and time.monotonic() < until:
        time.sleep(0.02)
    assert served.engine.num_requests == 0
    assert not served.core.has_work
    assert served.core.cache.num_free == served.core.cache.num_blocks
