"""Adapters over a frozen base: what they compute, what trains, and what stays as it is.

The slow twin is the model without adapters, called with ``W + s B A`` for its weights: autograd
gives the gradients of A and B through that sum, without a line of the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_k2.adapters import GROUPS, expand_targets, is_adapter
from tests.unit.model.tiny import build_model, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
RANK, ALPHA = 3, 6.0
TOKENS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(5))


def build(**changes: Any) -> Any:
    """Return a tiny model with the same base weights every time."""
    torch.manual_seed(7)
    return build_model(tiny_config(**changes))


def adapted(**changes: Any) -> Any:
    """Return the same model with adapters, frozen as the builder's hook does it."""
    from megatron_k2.model.lora import freeze_base

    return freeze_base([build(k2_lora_rank=RANK, k2_lora_alpha=ALPHA, **changes)])[0]


def randomise_(model: Any) -> None:
    """Give every B values as large as trained ones."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def loss_of(model: Callable[..., Any]) -> torch.Tensor:
    tokens, labels = TOKENS[:, :-1], TOKENS[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    loss: torch.Tensor = model(tokens, positions, None, labels=labels).mean()
    return loss


def merged(model: Any) -> dict[str, torch.Tensor]:
    """Return the base's parameters by name, ``W + s B A`` where there is an adapter."""
    parameters = dict(model.named_parameters())
    found = {name: p for name, p in parameters.items() if not is_adapter(name)}
    for name, up in parameters.items():
        if name.endswith("lora_B"):
            place = name.removesuffix("lora_B")
            found[place + "weight"] = (
                parameters[place + "weight"] + ALPHA / RANK * up @ parameters[place + "lora_A"]
            )
    return found


@pytest.fixture(scope="module")
def base(single_process: None) -> Any:
    return build()


def through_twin(base: Any, model: Any) -> torch.Tensor:
    weights = merged(model)
    return loss_of(lambda *a, **k: torch.func.functional_call(base, weights, a, k))


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_starts_as_the_base_bit_for_bit(base: Any) -> None:
    model = adapted()
    own = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(own[name], parameter), name
    assert torch.equal(loss_of(model), loss_of(base))


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(q_lora_rank=None),
        dict(k2_lora_targets=["attention", "mlp.experts.linear_fc2"]),
        dict(k2_lora_targets=["mlp.experts.linear_fc1", "shared"]),
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(
            recompute_granularity="selective",
            recompute_modules=["moe_act", "mla_up_proj", "shared_experts", "layernorm"],
            moe_grouped_gemm=True,
        ),
    ],
    ids=["all", "no query latent", "fc2", "fc1", "full recompute", "selective recompute"],
)
def test_loss_and_gradients_are_those_of_the_merged_weights(changes: dict[str, Any]) -> None:
    model, twin = adapted(**changes), build(q_lora_rank=changes.get("q_lora_rank", 26))
    randomise_(model)
    loss, expected = loss_of(model), through_twin(twin, model)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted = gradients(expected, model)
    found_gradients = gradients(loss, model)
    assert found_gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, found in found_gradients.items():
        assert wanted[name].any(), name
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=2e-6 * scale, msg=name)


def test_trains_the_adapters_and_nothing_else() -> None:
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    from megatron_k2 import parallel

    model = adapted()
    before = {
        name: value.clone() for name, value in model.state_dict().items() if value is not None
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    groups = parallel.get_pg_collection()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        _update_router_expert_bias([model], model.config, groups.tp_dp_cp)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    biases = 0
    for name, value in model.state_dict().items():
        if value is None or name.endswith("local_tokens_per_expert"):
            continue
        assert torch.equal(value, before[name]) != is_adapter(name), name
        biases += name.endswith("router.expert_bias")
    assert biases == 2


def test_counts_of_trained_weights_by_target() -> None:
    counts = {
        group: sum(
            p.numel() for p in adapted(k2_lora_targets=[group]).parameters() if p.requires_grad
        )
        for group in ("attention", "dense", "shared", "experts", "all")
    }
    heads, hidden = 4, 48
    attention = (
        RANK
        * 3
        * (
            (hidden + 26)
            + (26 + heads * 32)
            + (hidden + 28 + 12)
            + (28 + heads * 44)
            + (heads * 24 + hidden)
        )
    )
    mlp = lambda ffn: RANK * ((hidden + 2 * ffn) + (ffn + hidden))  # noqa: E731
    assert counts["attention"] == attention
    assert counts["dense"] == mlp(80)
    assert counts["shared"] == 2 * mlp(36)
    assert counts["experts"] == 2 * 7 * mlp(36)
    assert counts["all"] == sum(counts[group] for group in GROUPS)


def test_an_adapters_start_depends_on_its_place_alone() -> None:
    own, other = (dict(adapted(**changes).named_parameters()) for changes in (
        dict(), dict(k2_lora_targets=["experts"])))  # fmt: skip
    shared = [name for name in other if name.endswith("lora_A")]
    assert shared and all(torch.equal(own[name], other[name]) for name in shared)
    first, second = own[shared[0]][:2]
    assert not torch.equal(first, second), "two experts begin alike"
    bound = 48**-0.5
    whole = own["decoder.layers.0.mlp.linear_fc1.lora_A"]
    assert 0.9 * bound < whole.abs().max() <= bound
    seeded = dict(adapted(k2_lora_seed=1, k2_lora_targets=["experts"]).named_parameters())
    assert not torch.equal(seeded[shared[0]], own[shared[0]])


def test_blockwise_fp8_of_the_base_goes_with_adapters() -> None:
    fp8 = dict(fp8="e4m3", fp8_recipe="blockwise", k2_fp8_scope="linear",
               k2_fp8_activations=["moe_up_proj_input", "swiglu_input"])  # fmt: skip
    model, plain = adapted(**fp8), adapted()
    for one in (model, plain):
        randomise_(one)
    found, wanted = gradients(loss_of(model), model), gradients(loss_of(plain), plain)
    for name, gradient in found.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.35, (name, error)  # 3 mantissa bits on both sides of every product


def test_a_base_without_adapters_is_loaded_and_leaves_them_alone(base: Any) -> None:
    model = adapted()
    randomise_(model)
    kept = {n: p.clone() for n, p in model.named_parameters() if is_adapter(n)}
    model.load_state_dict(base.state_dict(), strict=True)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert torch.equal(parameter, kept[name]), name


def test_sharded_state_dict_holds_adapters_of_all_experts() -> None:
    state = adapted().decoder.sharded_state_dict(prefix="decoder.")
    experts = state["decoder.layers.1.mlp.experts.linear_fc2.lora_B"]
    assert experts.key == "decoder.layers.1.mlp.experts.experts.linear_fc2.lora_B"
    assert experts.global_shape == (7, 48, RANK)
    assert state["decoder.layers.2.self_attention.linear_kv_up_proj.lora_A"].global_shape == (
        RANK,
        28,
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["kv_b_proj"], ("self_attention.linear_kv_up_proj",)),
        (["attention"], GROUPS["attention"]),
        (["down_proj"], tuple(names[1] for names in list(GROUPS.values())[1:])),
        (["gate_proj", "up_proj"], tuple(names[0] for names in list(GROUPS.values())[1:])),
        (["mlp.experts.linear_fc1"], ("mlp.experts.linear_fc1",)),
        (None, tuple(name for names in GROUPS.values() for name in names)),
    ],
)
def test_targets_by_groups_megatrons_names_and_pefts(given: Any, expected: Any) -> None:
    assert expand_targets(given) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k2_lora_targets=["gate_proj"]), "give both"),
        (dict(k2_lora_targets=["router"]), "is not one of"),
        (dict(k2_lora_rank=-1), "at least 0"),
        (dict(k2_lora_alpha=0.0), "above 0"),
        (dict(k2_lora_targets=["dense"], moe_layer_freq=1), "none of these layers"),
        (dict(k2_lora_targets=["q_proj"]), "none of these layers"),
        (dict(transformer_impl="transformer_engine"), "use local"),
        (dict(delay_wgrad_compute=True), "--delay-wgrad-compute"),
        (dict(moe_shared_expert_overlap=True), "leaves shared out"),
    ],
)
def test_refuses_what_adapters_do_not_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**{"k2_lora_rank": 2, **changes})
