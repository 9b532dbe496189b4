"""The load of the experts: ratio, bias update through the patch, what is logged."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.reference.moe import bias_twin
from tests.unit.model.test_router import build_router, hidden
from tests.unit.model.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(autouse=True)
def fresh_tracker() -> Iterator[None]:
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    yield
    destroy_moe_metrics_tracker()


class Writer:
    """Collects what would go to TensorBoard."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self.scalars[name] = float(value)


def routed(rule: str) -> tuple[torch.nn.Module, Any]:
    """Return a model of one router that has seen tokens, and its configuration."""
    router = build_router(k2_router_bias_rule=rule)
    router.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    router(hidden(40))
    return torch.nn.ModuleList([router]), tiny_config(k2_router_bias_rule=rule)


def finalize(model: torch.nn.Module, config: Any) -> None:
    # The package binds a function of the same name over its module.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._update_router_expert_bias([model], config, tp_dp_cp_group=torch.distributed.group.WORLD)


def test_uniform_load_has_ratio_one_and_one_hot_load_the_number_of_experts() -> None:
    from megatron_k2.model.balance import load_ratio

    loads = torch.tensor([[8.0, 8, 8, 8], [32, 0, 0, 0], [0, 0, 0, 0], [12, 8, 8, 4]])
    assert load_ratio(loads).tolist() == [1.0, 4.0, 1.0, 1.5]


@pytest.mark.parametrize("rule", ["sign", "mean_centred"])
def test_upstreams_update_follows_the_configured_rule(rule: str) -> None:
    model, config = routed(rule)
    tokens = model[0].local_tokens_per_expert.tolist()
    finalize(model, config)
    expected = bias_twin([0.0] * 7, tokens, config.moe_router_bias_update_rate, rule)
    torch.testing.assert_close(model[0].expert_bias, torch.tensor(expected))


def test_frozen_and_evaluated_routers_are_left_alone() -> None:
    model, config = routed("sign")
    model[0].frozen_expert_bias = True
    finalize(model, config)
    model[0].frozen_expert_bias = False
    model.eval()
    finalize(model, config)
    assert float(model[0].expert_bias.abs().sum()) == 0.0


def test_load_of_the_last_step_is_kept_and_reported() -> None:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_k2.model.balance import expert_balance, load_ratio

    model, config = routed("sign")
    assert expert_balance([model]) == {}
    finalize(model, config)
    load = expert_balance([model])[2]
    assert float(load.sum()) == 40 * 3
    writer = Writer()
    text = get_moe_metrics_tracker().report(
        0.25, 1, writer=writer, per_layer_logging=True, track_names=[], num_layers=3
    )
    ratio = float(load_ratio(load))
    assert text == f" expert balance: {ratio:.2f} | cold experts: 0 |"
    assert writer.scalars["expert balance"] == pytest.approx(ratio)
    assert writer.scalars["moe/expert balance_layer_2"] == pytest.approx(ratio)
    again = get_moe_metrics_tracker().report(0.25, 2, writer=writer, track_names=[], num_layers=3)
    assert again == "", "one step's balance is reported once"


def test_mean_centred_rule_balances_a_router_like_the_sign_rule() -> None:
    """Both rules route alike at every step: they differ by a constant."""
    masks = []
    for rule in ("sign", "mean_centred"):
        router = build_router(k2_router_bias_rule=rule, moe_router_bias_update_rate=0.03125)
        router.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        model = torch.nn.ModuleList([router])
        for _ in range(10):
            router.local_tokens_per_expert.zero_()
            _, mask = router(hidden(64))
            finalize(model, router.config)
        masks.append(mask)
    assert torch.equal(masks[0], masks[1])
