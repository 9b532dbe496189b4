"""K2GroupedMLP as upstream's experts: state dicts, delayed gradients, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.model.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
EXPERTS, HIDDEN, FFN = 7, 48, 36


def build_experts(**changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.experts import K2GroupedMLP

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return K2GroupedMLP(EXPERTS, tiny_config(**changes), pg_collection=groups)


def build_sequential() -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = LocalSpecProvider().grouped_mlp_modules(True)
    return builder(EXPERTS, tiny_config(), pg_collection=groups)


def rows(loads: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(loads), HIDDEN, generator=generator)
    return x, torch.tensor(loads), torch.rand(sum(loads), generator=generator)


def copy_weights_(grouped: Any, sequential: Any) -> None:
    for index, expert in enumerate(sequential.local_experts):
        expert.linear_fc1.weight.data.copy_(grouped.linear_fc1.weight[index])
        expert.linear_fc2.weight.data.copy_(grouped.linear_fc2.weight[index])


def test_is_a_true_subclass_with_one_parameter_a_layer() -> None:
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    experts = build_experts()
    assert isinstance(experts, TEGroupedMLP)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {
        "linear_fc1.weight": (EXPERTS, 2 * FFN, HIDDEN),
        "linear_fc2.weight": (EXPERTS, HIDDEN, FFN),
    }


def test_equals_upstreams_sequential_experts() -> None:
    grouped, sequential = build_experts(), build_sequential()
    copy_weights_(grouped, sequential)
    x, counts, probs = rows([5, 0, 1, 9, 2, 0, 3])
    found, _ = grouped(x, counts, probs)
    expected, _ = sequential(x, counts, probs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sharded_state_dict_has_upstreams_keys_shapes_and_offsets() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    grouped, sequential = build_experts(), build_sequential()

    def shards(module: Any) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return key -> (global shape, local elements) over all shards of that key."""
        found: dict[str, tuple[tuple[int, ...], int]] = {}
        entries = module.sharded_state_dict(prefix="decoder.layers.1.mlp.experts.").values()
        for entry in entries:
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                numel = part.data.numel() if torch.is_tensor(part.data) else 0
                known = found.get(part.key, (tuple(part.global_shape), 0))[1]
                found[part.key] = (tuple(part.global_shape), known + numel)
        return found

    ours, theirs = shards(grouped), shards(sequential)
    assert ours == theirs
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    assert ours[key] == ((EXPERTS, 2 * FFN, HIDDEN), EXPERTS * 2 * FFN * HIDDEN)


@pytest.mark.parametrize("saves", ["grouped", "sequential"])
def test_checkpoint_moves_between_ours_and_upstreams_experts(saves: str, tmp_path: Any) -> None:
    from megatron.core import dist_checkpointing

    grouped, sequential = build_experts(), build_sequential()
    copy_weights_(grouped, sequential)
    source, target = (grouped, sequential) if saves == "grouped" else (sequential, grouped)
    dist_checkpointing.save(source.sharded_state_dict(prefix="experts."), str(tmp_path))
    for parameter in target.parameters():
        parameter.data.zero_()
    loaded = dist_checkpointing.load(target.sharded_state_dict(prefix="experts."), str(tmp_path))
    state = {name.removeprefix("experts."): value for name, value in loaded.items()}
    target.load_state_dict(state)
    x, counts, probs = rows([5, 0, 1, 9, 2, 0, 3])
    assert torch.equal(grouped.linear_fc1.weight[3], sequential.local_experts[3].linear_fc1.weight)
    torch.testing.assert_close(grouped(x, counts, probs)[0], sequential(x, counts, probs)[0])


def test_numbered_weights_of_transformer_engine_are_read() -> None:
    experts = build_experts()
    state = {
        f"linear_{layer}.weight{index}": weight.clone()
        for layer, module in (("fc1", experts.linear_fc1), ("fc2", experts.linear_fc2))
        for index, weight in enumerate(module.weight.detach())
    }
    state["linear_fc1._extra_state3"] = torch.empty(0)
    whole = experts.linear_fc1.weight.detach().clone()
    experts.linear_fc1.weight.data.zero_()
    experts.load_state_dict(state, strict=False)
    assert torch.equal(experts.linear_fc1.weight, whole)


def test_weight_gradients_wait_for_backward_dw() -> None:
    delayed = build_experts(
        delay_wgrad_compute=True,
        overlap_moe_expert_parallel_comm=True,
        expert_model_parallel_size=2,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    x, counts, probs = rows([5, 0, 1, 9, 2, 0, 3])
    x = x.bfloat16().requires_grad_()
    order: list[str] = []
    for name, module in (("fc1", delayed.linear_fc1), ("fc2", delayed.linear_fc2)):
        assert module.weight.skip_backward_post_hook
        module.register_wgrad_accumulation_and_reduce_hooks(lambda name=name: order.append(name))
    delayed(x, counts, probs)[0].sum().backward()
    assert x.grad is not None and delayed.linear_fc1.weight.grad is None and not order
    delayed.backward_dw()
    assert order == ["fc2", "fc1"]
    assert float(delayed.linear_fc1.weight.grad.abs().sum()) > 0
    with pytest.raises(RuntimeError, match="backward_dw before any backward pass"):
        delayed.backward_dw()


def test_backward_dw_is_nothing_without_the_delay() -> None:
    experts = build_experts()
    x, counts, probs = rows([5, 0, 1, 9, 2, 0, 3])
    experts(x, counts, probs)[0].sum().backward()
    before = experts.linear_fc1.weight.grad.clone()
    experts.backward_dw()
    assert torch.equal(experts.linear_fc1.weight.grad, before)


def test_initial_weights_differ_between_experts_and_have_the_configured_spread() -> None:
    weight = build_experts(init_method_std=0.02).linear_fc1.weight
    assert len({float(expert.sum()) for expert in weight}) == EXPERTS
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gated_linear_unit=False), "SwiGLU"),
        (dict(activation_func=torch.nn.functional.gelu), "SwiGLU"),
        (dict(add_bias_linear=True), "--disable-bias-linear"),
        (dict(glu_linear_offset=1.0), "glu_linear_offset"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_experts(**changes)
