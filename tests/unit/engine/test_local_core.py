"""The local engine's core: its cached steps are the model's own forward pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from megatron_k2.engine import attention
from megatron_k2.engine.base import Completion, EngineFull
from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.scheduler import Limits
from tests.unit.engine.small_models import (
    LIMITS,
    VOCABULARY,
    build,
    drain,
    full_log_probs,
    largest_error,
    prompt_of,
    randomise_,
    request_of,
    run,
)

pytestmark = pytest.mark.usefixtures("single_process")
TOLERANCE = 1e-5  # the issue's, of log-probabilities in fp32
EVERY = dict(top_log_probs=VOCABULARY)
CROWD = [request_of(f"r{n}", n, max_tokens=n % 7 + 2, **EVERY) for n in (1, 2, 5, 16, 17, 33, 61)]
TIGHT = replace(LIMITS, step_tokens=9)  # prompts come in chunks of a few tokens


@pytest.fixture(scope="module")
def model(single_process: None) -> Any:
    return build()


@pytest.fixture(autouse=True)
def one_thread(single_process: None) -> None:
    """Matrices this small only lose by a second thread, on a busy machine a hundredfold."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("limits", "changes"),
    [
        (LIMITS, {}),
        (TIGHT, {}),
        (TIGHT, dict(q_lora_rank=None)),
        (TIGHT, dict(rope_type="rope", qk_layernorm=False)),
    ],
    ids=["K2", "K2 in chunks", "no query latent", "plain rope, no latent norms"],
)
def test_every_log_prob_equals_the_full_forward(limits: Limits, changes: dict[str, Any]) -> None:
    model = build(**changes)
    answers = run(LocalCore(model, limits), CROWD)
    for name, answer in answers.items():
        assert answer.finish_reason == "length"
        assert len(answer.ids) == answer.request.sampling.max_tokens
        assert largest_error(model, answer) <= TOLERANCE, name


@pytest.mark.parametrize("way", [True, False], ids=["absorbed", "expanded"])
def test_both_ways_of_attending_agree(
    way: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "absorbs", lambda *sizes: way)
    answers = run(LocalCore(model, TIGHT), CROWD[-3:])
    assert max(largest_error(model, answer) for answer in answers.values()) <= TOLERANCE


def test_absorbing_is_chosen_by_the_number_of_products() -> None:
    kimi_k2 = dict(nope=128, rope=64, v_width=128, rank=512)
    assert attention.absorbs(1, 16, **kimi_k2)
    assert attention.absorbs(1, 100_000, **kimi_k2)
    assert not attention.absorbs(2048, 2048, **kimi_k2)
    assert attention.absorbs(64, 4096, **kimi_k2)  # a short chunk over a long past
    k2_nano = dict(nope=64, rope=32, v_width=64, rank=64)
    assert attention.absorbs(2048, 2048, **k2_nano)


def test_a_token_takes_the_latent_and_one_rotary_key(model: Any) -> None:
    core = LocalCore(model, LIMITS)
    config = model.config
    numbers = config.kv_lora_rank + config.qk_pos_emb_head_dim
    assert core.cache.bytes_per_token == numbers * 4 * config.num_layers
    assert LocalCore(build().bfloat16(), LIMITS).cache.bytes_per_token == (
        numbers * 2 * config.num_layers
    )


def test_bf16_stays_near_the_full_forward() -> None:
    model = build().bfloat16()
    for module in model.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    answers = run(LocalCore(model, TIGHT), CROWD)
    # Two bf16 paths differ by their roundings; a token at a router's border moves further.
    errors = sorted(largest_error(model, answer) for answer in answers.values())
    assert errors[len(errors) // 2] < 0.1


def test_an_aborted_request_frees_its_blocks_and_disturbs_nobody(model: Any) -> None:
    core = LocalCore(model, TIGHT)
    before = core.cache.num_free
    for request in CROWD:
        core.add(request)
    answers = {}
    for _ in range(5):
        core.step()
    core.abort("r61")  # still reading its prompt
    core.abort("r33")
    core.abort("nobody")
    late = request_of("late", 40, **EVERY)  # takes over the freed blocks
    core.add(late)
    answers = drain(core, [*CROWD, late])
    assert answers["r61"].finish_reason == answers["r33"].finish_reason == "abort"
    assert answers["r61"].ids == []
    assert largest_error(model, answers["late"]) <= TOLERANCE
    assert core.cache.num_free == before


def test_preempted_requests_are_answered_as_if_they_had_not_been(model: Any) -> None:
    crowd = [request_of(f"p{n}", 20 + n, max_tokens=60, top_log_probs=3) for n in range(4)]
    core = LocalCore(model, replace(LIMITS, cache_tokens=128))
    answers = run(core, crowd)
    assert core.scheduler.preemptions > 0
    assert max(largest_error(model, answer) for answer in answers.values()) <= TOLERANCE
    assert core.cache.num_free == core.cache.num_blocks


def test_an_answer_does_not_depend_on_the_batch(model: Any) -> None:
    drawn = request_of("drawn", 23, max_tokens=12, temperature=0.9, seed=5)
    narrow = request_of(
        "narrow", 9, max_tokens=12, temperature=1.3, top_p=0.7, top_k=20, seed=5
    )  # fmt: skip
    alone = {
        request.id: run(LocalCore(model, LIMITS), [request])[request.id]
        for request in (drawn, narrow)
    }
    crowd = run(LocalCore(model, replace(TIGHT, cache_tokens=160)), [*CROWD, narrow, drawn])
    for name, answer in alone.items():
        assert crowd[name].ids == answer.ids
    other = replace(drawn, sampling=replace(drawn.sampling, seed=6))
    assert run(LocalCore(model, LIMITS), [other])["drawn"].ids != alone["drawn"].ids


@pytest.mark.parametrize("length", [2, 17, 30, 33, 90])
def test_a_prompt_that_many_ask_is_read_once(model: Any, length: int) -> None:
    """Page borders before, at and after the last token; 90 tokens are read in two chunks."""
    group = [
        replace(
            request_of("", length, max_tokens=6 + n, temperature=0.9, seed=n, top_log_probs=9),
            id=f"g{n}",
        )
        for n in range(5)
    ]
    core = LocalCore(model, LIMITS)
    answers = run(core, group)
    assert core.scheduler.prompts.num_tokens == 4 * (length - 1)
    assert max(largest_error(model, answer) for answer in answers.values()) <= TOLERANCE
    for request in group:
        alone = run(LocalCore(model, LIMITS), [request])[request.id]
        assert alone.ids == answers[request.id].ids
    assert core.cache.num_free == core.cache.num_blocks


def test_shared_pages_outlive_who_read_them(model: Any) -> None:
    core = LocalCore(model, replace(LIMITS, cache_tokens=128))
    crowd = [
        replace(request_of("p", 40, max_tokens=60, top_log_probs=3), id=f"p{n}") for n in range(5)
    ]
    late = replace(crowd[0], id="late")
    found = {request.id: Completion(request) for request in (*crowd, late)}
    for request in crowd:
        core.add(request)
    for step in count():
        if step == 6:
            core.abort("p0")  # who read the prompt
            core.add(late)
        for name, piece in core.step():
            found[name].add(piece)
        if not core.has_work:
            break
    assert core.scheduler.preemptions > 0
    assert found["p0"].finish_reason == "abort"
    assert max(largest_error(model, answer) for answer in found.values()) <= TOLERANCE
    assert core.cache.num_free == core.cache.num_blocks


def test_what_old_weights_have_read_is_not_shared_with_new_requests() -> None:
    model = build()
    core = LocalCore(model, LIMITS)
    core.add(request_of("a", 40, max_tokens=20))
    for _ in range(3):
        core.step()
    core.update_weights(1, lambda: randomise_(model, seed=9))
    fresh = replace(request_of("a", 40, **EVERY), id="b")
    core.add(fresh)
    found = Completion(fresh)
    while core.has_work:
        for name, piece in core.step():
            if name == "b":
                found.add(piece)
    assert largest_error(model, found) <= TOLERANCE


def test_stop_ids_and_the_context_end_an_answer(model: Any) -> None:
    free = run(LocalCore(model, LIMITS), [request_of("a", 12)])["a"]
    stop = free.ids[3]
    stopped = run(LocalCore(model, LIMITS), [request_of("a", 12, stop_ids=(stop,))])["a"]
    assert stopped.ids == free.ids[: free.ids.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    full = run(LocalCore(model, LIMITS), [request_of("a", 120, max_tokens=50)])["a"]
    assert (len(full.ids), full.finish_reason) == (8, "length")


def test_new_weights_are_followed_and_versioned() -> None:
    model = build()
    core = LocalCore(model, LIMITS, weight_version=3)
    request = request_of("a", 20, **EVERY)
    core.add(request)
    first = [piece for _ in range(4) for _, piece in core.step()]  # one reads the prompt
    core.update_weights(4, lambda: randomise_(model, seed=9), "recompute")
    answer = drain(core, [request])["a"]
    assert [piece.versions[0] for piece in first] == [3, 3, 3]
    assert set(answer.versions) == {4}
    tokens = [*request.prompt, *(piece.ids[0] for piece in first), *answer.ids]
    expected = full_log_probs(model, tokens)[len(request.prompt) + 2 : -1]
    for row, top in zip(expected, answer.top, strict=True):
        assert max(abs(value - float(row[one])) for one, value in top) <= TOLERANCE
    fresh = run(core, [request_of("b", 30, **EVERY)])["b"]
    assert largest_error(model, fresh) <= TOLERANCE


def test_kept_latents_are_those_of_the_old_weights() -> None:
    model = build()
    core = LocalCore(model, LIMITS)
    request = request_of("a", 20, **EVERY)
    core.add(request)
    core.step()
    pages = [page.clone() for page in core.cache.pages]
    core.update_weights(1, lambda: randomise_(model, seed=9))
    core.step()
    written = [int((old != new).any(1).sum()) for old, new in zip(pages, core.cache.pages)]  # noqa: B905
    assert written == [1] * len(pages)  # the new token's latent, nothing else
    with pytest.raises(ValueError, match="keep or recompute"):
        core.update_weights(2, lambda: None, "forget")  # type: ignore[arg-type]


def test_recorded_experts_are_the_routers_choice(model: Any) -> None:
    request = request_of("a", 14)
    answer = run(LocalCore(model, TIGHT, record_routes=True), [request])["a"]
    chosen = []
    routers = [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
    hooks = [
        router.register_forward_hook(lambda _, inputs, output: chosen.append(output[1]))
        for router in routers
    ]
    full_log_probs(model, [*request.prompt, *answer.ids])
    for hook in hooks:
        hook.remove()
    assert len(answer.routed_experts) == len(answer.ids)
    for index, experts in enumerate(answer.routed_experts):
        row = len(request.prompt) - 1 + index
        assert [set(one) for one in experts] == [
            set(map_[row].nonzero()[:, 0].tolist()) for map_ in chosen
        ]


def test_adapters_are_part_of_the_weights() -> None:
    model = build(k2_lora_rank=3, k2_lora_alpha=6.0)
    answers = run(LocalCore(model, LIMITS), CROWD[-2:])
    assert max(largest_error(model, answer) for answer in answers.values()) <= TOLERANCE


def test_requests_that_cannot_run_are_refused(model: Any) -> None:
    core = LocalCore(model, replace(LIMITS, max_waiting=1), vocab_size=90)
    with pytest.raises(ValueError, match="empty"):
        core.add(request_of("a", 0))
    with pytest.raises(ValueError, match="128"):
        core.add(request_of("a", 128))
    with pytest.raises(ValueError, match="vocabulary of 90"):
        core.add(replace(request_of("a", 3), prompt=(1, 95)))
    core.add(replace(request_of("a", 3), prompt=(1, 2)))
    with pytest.raises(ValueError, match="under way"):
        core.add(replace(request_of("a", 3), prompt=(1, 2)))
    with pytest.raises(EngineFull):
        core.add(replace(request_of("b", 3), prompt=(1, 2)))


def test_padding_of_the_vocabulary_is_never_chosen(model: Any) -> None:
    core = LocalCore(model, LIMITS, vocab_size=40)
    prompt = tuple(one % 40 for one in prompt_of(9))
    asked = [
        replace(request_of(f"{t}", 9, max_tokens=40, temperature=t, seed=1), prompt=prompt)
        for t in (0.0, 3.0)
    ]
    for answer in run(core, asked).values():
        assert max(answer.ids) < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(moe_router_score_function="softmax", moe_router_enable_expert_bias=False), "softmax"),
        (dict(fp32_residual_connection=True), "fp32-residual"),
    ],
)
def test_models_that_it_would_compute_wrongly_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LocalCore(build(**changes), LIMITS)


def test_limits_that_cannot_hold_one_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="one sequence"):
        replace(LIMITS, cache_tokens=64)
    with pytest.raises(ValueError, match="must exceed max_running"):
        replace(LIMITS, step_tokens=8)


def test_nothing_is_left_after_close(model: Any) -> None:
    core = LocalCore(model, LIMITS)
    core.add(request_of("a", 5))
    core.step()
    core.close()
    assert not core.has_work
    assert core.cache.pages == []
    assert torch.is_grad_enabled()
