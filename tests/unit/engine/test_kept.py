"""Pages of ended requests: what they save, whom they may serve, and that they never lie."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_k2.engine.base import Completion, Request, Sampling
from megatron_k2.engine.cache import BLOCK_TOKENS
from megatron_k2.engine.core import LocalCore
from tests.unit.engine.small_models import (
    LIMITS,
    VOCABULARY,
    build,
    largest_error,
    prompt_of,
    randomise_,
    run,
)

pytestmark = pytest.mark.usefixtures("single_process")
TOLERANCE = 2e-5  # of 60 random prompts the largest is 1e-5, the median 5e-6, kept pages or none
KEEPING = replace(LIMITS, keeps_pages=True)
RULES = Sampling(max_tokens=12, temperature=0.0, top_log_probs=VOCABULARY)


@pytest.fixture(scope="module")
def model(single_process: None) -> Any:
    torch.set_num_threads(1)
    return build()


def ask(core: LocalCore, name: str, prompt: tuple[int, ...], **more: Any) -> Completion:
    request = Request(name, prompt, RULES, **more)
    return run(core, [request])[name]


def test_the_next_turn_reads_only_what_is_new(model: Any) -> None:
    core = LocalCore(model, KEEPING)
    first = ask(core, "turn 1", prompt_of(40))
    prompt = (*prompt_of(40), *first.ids, *prompt_of(9))
    assert largest_error(model, ask(core, "turn 2", prompt)) <= TOLERANCE
    # The last token of an answer is never read by the request that it ends.
    assert core.scheduler.kept.num_tokens == (40 + 12 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    other = (*prompt_of(40)[:20], *prompt_of(30))
    before = core.scheduler.kept.num_tokens
    assert largest_error(model, ask(core, "begins alike", other)) <= TOLERANCE
    assert core.scheduler.kept.num_tokens - before == BLOCK_TOKENS
    assert largest_error(model, ask(core, "the same again", prompt_of(33))) <= TOLERANCE
    assert largest_error(model, ask(core, "the same again", prompt_of(33))) <= TOLERANCE


def test_answers_of_a_group_read_the_rest_of_their_prompt_once(model: Any) -> None:
    core = LocalCore(model, KEEPING)
    ask(core, "before", prompt_of(50))
    prompt = (*prompt_of(50)[:36], *prompt_of(31))
    group = [Request(f"g{n}", prompt, replace(RULES, max_tokens=5 + n)) for n in range(5)]
    answers = run(core, group)
    assert max(largest_error(model, one) for one in answers.values()) <= TOLERANCE
    assert core.scheduler.prompts.num_tokens == 4 * (len(prompt) - 1)


def test_new_weights_take_old_pages_only_for_who_says_so() -> None:
    model = build()
    core = LocalCore(model, KEEPING)
    ask(core, "before", prompt_of(40))
    core.update_weights(1, lambda: randomise_(model, seed=9))
    fresh = ask(core, "fresh", prompt_of(40))
    assert core.scheduler.kept.num_tokens == 0
    assert largest_error(model, fresh) <= TOLERANCE
    core.update_weights(2, lambda: randomise_(model, seed=9))  # the same numbers again
    old = ask(core, "goes on", (*prompt_of(40), *fresh.ids), old_latents=True)
    assert core.scheduler.kept.num_tokens == (40 + 12 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert largest_error(model, old) <= TOLERANCE
    core.update_weights(3, lambda: randomise_(model, seed=10))
    older = ask(core, "other numbers", (*prompt_of(40), *fresh.ids), old_latents=True)
    assert largest_error(model, older) > 1e-3  # they are those of the old weights indeed
    # What was read over old pages is old itself.
    again = ask(core, "fresh again", (*prompt_of(40), *fresh.ids))
    assert largest_error(model, again) <= TOLERANCE
    core.update_weights(4, lambda: None, "recompute")
    assert len(core.scheduler.kept) == 0


def test_a_request_that_lived_through_new_weights_leaves_old_pages() -> None:
    model = build()
    core = LocalCore(model, KEEPING)
    request = Request("a", prompt_of(40), replace(RULES, max_tokens=20))
    core.add(request)
    for _ in range(8):
        core.step()
    core.update_weights(1, lambda: randomise_(model, seed=9))
    while core.has_work:
        core.step()
    assert largest_error(model, ask(core, "b", prompt_of(40))) <= TOLERANCE


@pytest.mark.parametrize("seed", range(2))
def test_a_tight_cache_under_random_requests_answers_as_without(seed: int) -> None:
    """Prompts of a tree, aborts, preemptions: every answer right, every block accounted for.

    Each token has all experts: of this many random tokens some would lie on a router's border.
    """
    torch.set_num_threads(1)
    model = build(moe_router_topk=7)
    source = random.Random(seed)
    core = LocalCore(model, replace(KEEPING, cache_tokens=192, max_running=4, step_tokens=20))
    said: list[tuple[int, ...]] = [prompt_of(30, 1), prompt_of(17, 2)]
    found: dict[str, Completion] = {}
    for number in range(40):
        begin = source.choice(said[-4:])
        cut = begin[: source.randint(len(begin) // 2, len(begin))]
        prompt = (*cut, *prompt_of(source.randint(1, 20), source.randint(0, 3)))[:90]
        rules = Sampling(source.randint(1, 30), 1.0, seed=number, top_log_probs=5)
        request = Request(str(number), prompt, rules)
        found[request.id] = Completion(request)
        core.add(request)
        for _ in range(source.randint(0, 12)):
            if source.random() < 0.05:
                core.abort(source.choice(list(found)))
            for name, piece in core.step():
                found[name].add(piece)
                if piece.finish_reason:
                    said.append((*found[name].request.prompt, *found[name].ids))
    while core.has_work:
        for name, piece in core.step():
            found[name].add(piece)
    kept = core.scheduler.kept
    assert kept.num_tokens > 100
    assert core.cache.num_free + len(kept) == core.cache.num_blocks
    assert max(largest_error(model, answer) for answer in found.values()) <= TOLERANCE
    kept.forget_all()
    assert core.cache.num_free == core.cache.num_blocks


def test_a_group_that_waits_while_weights_change_still_reads_its_prompt_once(model: Any) -> None:
    core = LocalCore(model, LIMITS)
    group = [Request(f"g{n}", prompt_of(100), replace(RULES, max_tokens=4)) for n in range(8)]
    for request in group:
        core.add(request)
    core.step()  # one reads a first chunk, the others wait for it
    core.update_weights(1, lambda: None)
    while core.has_work:
        core.step()
    # The one that had begun is of the old weights; of the others one reads and six share.
    assert core.scheduler.prompts.num_tokens == 6 * 99


def test_who_asks_for_room_in_vain_takes_nobodys_pages(model: Any) -> None:
    core = LocalCore(model, replace(KEEPING, cache_tokens=192))
    first = ask(core, "turn 1", prompt_of(60))
    core.add(Request("long", prompt_of(110), replace(RULES, max_tokens=12)))
    core.step()
    kept = len(core.scheduler.kept)
    assert kept > 0
    after = (*prompt_of(60), *first.ids, *prompt_of(9))
    core.add(Request("turn 2", after, replace(RULES, max_tokens=40)))
    core.step()
    assert len(core.scheduler.waiting) == 1 and len(core.scheduler.kept) == kept
    while core.has_work:
        core.step()
    assert core.scheduler.kept.num_tokens == (60 + 12 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
