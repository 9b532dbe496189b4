"""The whole MoE layer on one process: against the token-by-token twin and against upstream's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference.moe import moe_twin
from tests.unit.model.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def build_layer(stock: bool = False, **changes: Any) -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend

    from megatron_k2.model.moe import get_k2_moe_spec

    config = tiny_config(**changes)
    if stock:
        builder = get_moe_module_spec_for_backend(LocalSpecProvider(), config.num_moe_experts)
    else:
        builder = get_k2_moe_spec(config, use_transformer_engine=False)
    layer = builder(config=config, layer_number=2)
    layer.set_layer_number(2)
    return layer


def randomize_(layer: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    layer.router.weight.data.mul_(10)
    layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, 7))


def twin(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weights = dict(
        router=layer.router.weight,
        bias=layer.router.expert_bias,
        fc1=layer.experts.linear_fc1.weight,
        fc2=layer.experts.linear_fc2.weight,
    )
    exact = {name: value.detach().double() for name, value in weights.items()}
    shared = layer.shared_experts
    pair = tuple(m.weight.detach().double() for m in (shared.linear_fc1, shared.linear_fc2))
    return moe_twin(x.double(), **exact, shared=pair, topk=3, scaling_factor=2.827)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (9, 1)])
def test_output_equals_the_twin(dispatcher: str, shape: tuple[int, int]) -> None:
    layer = build_layer(moe_token_dispatcher_type=dispatcher)
    randomize_(layer)
    x = torch.randn(*shape, 48)
    found, bias = layer(x)
    assert bias is None and found.shape == x.shape
    expected = twin(layer, x.view(-1, 48)).view_as(found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_upstreams_sequential_layer() -> None:
    ours, stock = build_layer(), build_layer(stock=True)
    randomize_(ours)
    stock.router.load_state_dict(ours.router.state_dict())
    stock.shared_experts.load_state_dict(ours.shared_experts.state_dict())
    for index, expert in enumerate(stock.experts.local_experts):
        expert.linear_fc1.weight.data.copy_(ours.experts.linear_fc1.weight[index])
        expert.linear_fc2.weight.data.copy_(ours.experts.linear_fc2.weight[index])
    x, grad = torch.randn(17, 2, 48), torch.randn(17, 2, 48)
    grads = []
    for layer in (ours, stock):
        leaf = x.clone().requires_grad_()
        layer(leaf)[0].backward(grad)
        shared = layer.shared_experts.linear_fc1.weight.grad
        grads.append([leaf.grad, layer.router.weight.grad, shared])
    grads[0].append(ours.experts.linear_fc1.weight.grad)
    grads[1].append(torch.stack([e.linear_fc1.weight.grad for e in stock.experts.local_experts]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.router.local_tokens_per_expert, stock.router.local_tokens_per_expert)


def test_classes_are_true_subclasses_of_upstreams() -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    layer = build_layer()
    assert isinstance(layer, MoELayer) and isinstance(layer.router, TopKRouter)
    assert isinstance(layer.shared_experts, SharedExpertMLP)
    assert isinstance(layer.token_dispatcher, MoEAlltoAllTokenDispatcher)


@pytest.mark.parametrize(
    "changes",
    [
        dict(moe_expert_capacity_factor=0.5),
        dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True),
        dict(recompute_granularity="selective", recompute_modules=["moe"]),
        dict(moe_shared_expert_overlap=True),
    ],
    ids=["dropping", "padding", "recompute", "shared overlap"],
)
def test_upstream_options_give_upstreams_result(changes: dict[str, Any]) -> None:
    results = []
    for layer in (build_layer(**changes), build_layer(moe_token_dispatcher_type="alltoall")):
        randomize_(layer)
        x = torch.randn(10, 1, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out, _ = layer(x)
        out.sum().backward()
        results.append((out.detach(), x.grad, layer.experts.linear_fc2.weight.grad))
    if "moe_expert_capacity_factor" in changes:
        dropped = (results[0][0] - results[1][0]).abs().amax(-1) > 1e-6
        assert 0 < int(dropped.sum()) < 10
    else:
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_dense_mlp_equals_upstreams() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.mlp import MLP

    from megatron_k2.model.moe import get_k2_dense_mlp_spec

    config = tiny_config()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = get_k2_dense_mlp_spec(config, use_transformer_engine=False)
    ours = spec(config=config, pg_collection=groups, is_mtp_layer=False)
    stock = MLP.as_mlp_submodule(spec.keywords["submodules"], config, groups, is_mtp_layer=False)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(6, 2, 48, requires_grad=True)
    found, expected = ours(x)[0], stock(x)[0]
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    leaves = (x, ours.linear_fc1.weight)
    stock_leaves = (x, stock.linear_fc1.weight)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, stock_leaves, grad)
    )
