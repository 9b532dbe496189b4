"""The engine over a transformers model, on a tiny one with random weights."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_k2.engine.base import Completion, EngineFull, Request, Sampling, generate
from megatron_k2.engine.hugging_face import HuggingFaceEngine

VOCABULARY = 50
PROMPTS = [(1, 2, 3), (7,), tuple(range(20))]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that tokens differ in probability
    )
    return LlamaForCausalLM(config).eval()


def answers(engine: HuggingFaceEngine, requests: list[Request]) -> list[Completion]:
    async def ask() -> list[Completion]:
        done = await asyncio.gather(*(generate(engine, request) for request in requests))
        await engine.close()
        return list(done)

    return asyncio.run(ask())


@pytest.mark.parametrize("chunk", [4, 512])
def test_log_probs_are_those_of_the_full_forward(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("megatron_k2.engine.hugging_face.PREFILL_CHUNK", chunk)
    sampling = Sampling(12, temperature=1.3, top_p=0.9, top_k=20, seed=5, top_log_probs=3)
    requests = [Request(str(k), prompt, sampling) for k, prompt in enumerate(PROMPTS)]
    for done in answers(HuggingFaceEngine(model, max_running=2), requests):
        ids = [*done.request.prompt, *done.ids]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(done.request.prompt) - 1
        rows = expected[first : first + len(done.ids)]
        picked = rows.gather(1, torch.tensor(done.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.log_probs), picked, atol=1e-5, rtol=0)
        assert [[i for i, _ in top] for top in done.top] == rows.topk(3).indices.tolist()
        assert (done.finish_reason, len(done.ids)) == ("length", 12)


def test_an_answer_does_not_depend_on_what_else_runs(model: LlamaForCausalLM) -> None:
    requests = [Request(str(k), PROMPTS[k % 3], Sampling(9, seed=k)) for k in range(7)]
    together = answers(HuggingFaceEngine(model, max_running=4), requests)
    alone = [answers(HuggingFaceEngine(model), [request])[0] for request in requests]
    assert together == alone
    assert len({tuple(done.ids) for done in together}) == 7


def test_greedy_answers_end_with_the_stop_id_and_at_the_context(model: LlamaForCausalLM) -> None:
    greedy = Sampling(100, temperature=0.0)
    (whole,) = answers(HuggingFaceEngine(model), [Request("a", (1, 2), greedy)])
    assert (len(whole.ids), whole.finish_reason) == (62, "length")  # the context is 64
    stop = whole.ids[4]
    stopping = Sampling(100, temperature=0.0, stop_ids=(stop,))
    (short,) = answers(HuggingFaceEngine(model), [Request("a", (1, 2), stopping)])
    assert short.ids == whole.ids[: whole.ids.index(stop) + 1]
    assert short.finish_reason == "stop"


def test_aborted_and_closed_requests_leave_nothing(model: LlamaForCausalLM) -> None:
    engine = HuggingFaceEngine(model, max_running=1, max_waiting=1)

    async def ask() -> None:
        first = engine.stream(Request("a", (1,), Sampling(60)))
        await anext(first)
        waiting = asyncio.create_task(generate(engine, Request("b", (1,), Sampling(60))))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineFull):
            await generate(engine, Request("c", (1,), Sampling(1)))
        await first.aclose()
        while not engine._running:
            await asyncio.sleep(0.001)
        await engine.abort("b")
        done = await waiting
        assert done.finish_reason == "abort"
        assert not engine._running
        assert not engine._waiting
        await engine.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("prompt", "reason"), [((), "empty"), ((50,), "vocabulary"), ((1,) * 64, "context")]
)
def test_impossible_prompts_are_refused(
    model: LlamaForCausalLM, prompt: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        answers(HuggingFaceEngine(model), [Request("a", prompt, Sampling(1))])
