"""K2TopKRouter: scores, weights, bias, counts, the scaling rule, the auxiliary loss, replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference.moe import bias_twin, routing_twin, sequence_aux_loss_twin
from tests.unit.model.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
FACTOR = 2.827


def build_router(**changes: Any) -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_k2.model.router import K2TopKRouter

    router = K2TopKRouter(tiny_config(**changes), pg_collection=get_default_pg_collection())
    router.set_layer_number(2)
    return router


def hidden(tokens: int, batch: int = 1, size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, batch, size, generator=generator)


@pytest.mark.parametrize("tokens", [1, 11])
def test_weights_and_choice_equal_the_twin(tokens: int) -> None:
    router = build_router()
    router.weight.data.normal_()
    router.expert_bias.copy_(torch.linspace(-0.5, 0.5, 7))
    x = hidden(tokens)
    probs, mask = router(x)
    logits = x.view(tokens, -1).double() @ router.weight.double().T
    experts, weights = routing_twin(logits, router.expert_bias.double(), 3, FACTOR)
    for token in range(tokens):
        assert sorted(experts[token]) == mask[token].nonzero().view(-1).tolist()
        torch.testing.assert_close(probs[token, experts[token]].double(), weights[token])


def test_weights_of_a_token_sum_to_the_scaling_factor() -> None:
    probs, mask = build_router()(hidden(50))
    torch.testing.assert_close(probs.sum(-1), torch.full((50,), FACTOR))
    assert bool((mask.sum(-1) == 3).all())


def test_a_constant_bias_changes_nothing() -> None:
    router = build_router()
    router.weight.data.normal_()
    before = router(hidden(50))
    router.expert_bias += 0.25
    after = router(hidden(50))
    assert torch.equal(before[1], after[1]) and torch.equal(before[0], after[0])


def test_kimi_k2_shape_routes_eight_of_384() -> None:
    router = build_router(num_moe_experts=384, moe_router_topk=8)
    probs, mask = router(hidden(5))
    assert mask.shape == (5, 384) and bool((mask.sum(-1) == 8).all())
    torch.testing.assert_close(probs.sum(-1), torch.full((5,), FACTOR))


def test_bias_and_counts_stay_fp32_in_a_bf16_model_and_counts_are_exact() -> None:
    router = build_router(bf16=True, params_dtype=torch.bfloat16)
    router.bfloat16()
    for _ in range(3):
        router(hidden(301).bfloat16())
    assert router.expert_bias.dtype == torch.float32
    assert router.local_tokens_per_expert.dtype == torch.float32
    assert int(router.local_tokens_per_expert.sum()) == 3 * 301 * 3


def test_upstream_counts_still_fall_to_bf16() -> None:
    """Delete K2TopKRouter._maintain_float32_expert_bias when this fails."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    config = tiny_config(bf16=True, params_dtype=torch.bfloat16)
    stock = TopKRouter(config, pg_collection=get_default_pg_collection()).bfloat16()
    for _ in range(3):
        stock(hidden(301).bfloat16())
    assert stock.local_tokens_per_expert.dtype == torch.bfloat16
    assert int(stock.local_tokens_per_expert.float().sum()) != 3 * 301 * 3


@pytest.mark.parametrize("changes", [{}, dict(moe_router_load_balancing_type="seq_aux_loss")])
def test_masks_give_upstreams_routing_and_gradients(changes: dict[str, Any]) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    router = build_router(moe_aux_loss_coeff=0.1, **changes)
    router.weight.data.normal_()
    router.expert_bias.copy_(torch.linspace(-0.5, 0.5, 7))
    logits = router.gating(hidden(33, batch=2)).detach()
    results = []
    for routing in (router.routing, lambda x: TopKRouter.routing(router, x)):
        leaf = logits.clone().requires_grad_()
        probs, mask = routing(leaf)
        (probs * torch.linspace(0, 1, 7)).sum().backward()
        results.append((probs.detach(), mask, leaf.grad))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0], results[1])


def test_topk_mask_marks_k_scores_also_among_equals_and_nan() -> None:
    from megatron_k2.model.router import topk_mask

    scores = torch.tensor([[1.0, 1, 1, 1], [0, 3, 2, 2], [5, torch.nan, 1, 0], [4, 3, 2, 1]])
    mask = topk_mask(scores, 2)
    assert mask.sum(-1).tolist() == [2, 2, 2, 2]
    expected = torch.zeros(4, 4, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)
    assert torch.equal(mask, expected)


def test_evaluation_and_padding_are_not_counted() -> None:
    router = build_router()
    with torch.no_grad():
        router(hidden(20))
    assert int(router.local_tokens_per_expert.sum()) == 0
    padding = torch.zeros(20, 1, dtype=torch.bool)
    padding[15:] = True
    router(hidden(20), padding_mask=padding)
    assert int(router.local_tokens_per_expert.sum()) == 15 * 3


def test_sequence_aux_loss_has_the_twins_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    changes = dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1)
    router = build_router(**changes)
    router.weight.data.normal_()
    x = hidden(12, batch=2)
    probs, _ = router(x)
    (probs * 0).sum().backward()
    weight = router.weight.detach().double().requires_grad_()
    losses = [sequence_aux_loss_twin(x[:, i].double() @ weight.T, 3, 0.1) for i in range(2)]
    (sum(losses) / 2).backward()
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)


def test_routing_replays_on_the_cpu() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    RouterReplay.clear_global_router_replay_instances()
    router = build_router(moe_enable_routing_replay=True)
    router.weight.data.normal_()
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    _, recorded = router(hidden(9))
    RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    router.weight.data.normal_()
    probs, replayed = router(hidden(9))
    assert torch.equal(recorded, replayed)
    torch.testing.assert_close(probs.sum(-1), torch.full((9,), FACTOR))
    RouterReplay.clear_global_router_replay_instances()


@pytest.mark.parametrize(
    ("shape", "published"), [((64, 6), 2.446), ((384, 8), 2.8277), ((32, 4), 1.996)]
)
def test_scaling_rule_gives_the_published_factors(shape: tuple[int, int], published: float) -> None:
    from megatron_k2.model.router import published_scaling_factor

    assert published_scaling_factor(*shape) == pytest.approx(published, abs=5e-4)


def test_scaling_rule_refuses_more_experts_than_there_are() -> None:
    from megatron_k2.model.router import published_scaling_factor

    assert published_scaling_factor(1, 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"--moe-router-topk 9 is not in 1\.\.8"):
        published_scaling_factor(8, 9)


@pytest.mark.parametrize("rule", ["sign", "mean_centred"])
def test_bias_rules_equal_the_twin(rule: str) -> None:
    from megatron_k2.model.router import updated_expert_bias

    tokens = [4.0, 4.0, 9.0, 0.0, 3.0]
    bias = [0.5, -0.25, 0.0, 0.125, 1.0]
    found = updated_expert_bias(torch.tensor(bias), torch.tensor(tokens), 0.01, rule)
    torch.testing.assert_close(found, torch.tensor(bias_twin(bias, tokens, 0.01, rule)))
    if rule == "mean_centred":
        assert float(found.sum()) == pytest.approx(sum(bias), abs=1e-6)


def test_sign_rule_is_upstreams_bit_for_bit() -> None:
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    from megatron_k2.model.router import updated_expert_bias

    tokens = torch.randint(0, 50, (4, 7)).float()
    bias = torch.randn(4, 7)
    expected = get_updated_expert_bias(tokens.clone(), bias, 0.001, torch.distributed.group.WORLD)
    assert torch.equal(updated_expert_bias(bias, tokens, 0.001, "sign"), expected)


def test_unknown_rule_is_refused() -> None:
    from megatron_k2.model.router import updated_expert_bias

    with pytest.raises(ValueError, match="'median' is not one of sign, mean_centred"):
        updated_expert_bias(torch.zeros(2), torch.zeros(2), 0.1, "median")
