"""``--k2-fp8-scope`` on Transformer Engine's real modules: which linears run in FP8, by name."""

from __future__ import annotations

from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.quantization.quant_config import MatchContext, RecipeConfig

from megatron_k2.fp8.recipes import check_scope, scope_recipe
from megatron_k2.fp8.scope import SCOPES
from megatron_k2.layouts import propose_pipeline_layout
from megatron_k2.planning.stage import enter_fake_world
from tests.te.modules import RECIPES, build, linears, quantised

LAYERS = {0: False, 1: True, 2: True, 3: True}  # of k2-micro: whether it is a MoE layer
COMBINATIONS = [
    (recipe, scope, gather)
    for recipe, scope, gather in product(RECIPES, SCOPES, (False, True))
    if (recipe, scope) != ("blockwise", "all")  # Transformer Engine has no such attention
]


def names(layers: dict[int, bool]) -> tuple[set[str], set[str]]:
    """Return the names of all layers' linears: (those of experts, the others)."""
    found = [linears(layer, is_moe) for layer, is_moe in layers.items()]
    return set().union(*(f[0] for f in found)), set().union(*(f[1] for f in found))


@pytest.mark.parametrize("recipe, scope, gather", COMBINATIONS)
def test_each_scope_quantises_its_linears_and_no_other(
    recipe: str, scope: str, gather: bool
) -> None:
    model = build("k2-micro", scope, fp8_recipe=recipe, fp8_param=gather)
    experts, others = names(LAYERS)
    inside = experts if scope == "experts" else experts | others
    runs = quantised(model)
    assert set(runs) == experts | others
    assert {name for name, on in runs.items() if on} == inside
    assert not any(quantised(model, in_context=False).values())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    modules = dict(model.named_modules())
    held = {name for name in runs if modules[name].primary_weights_in_fp8}
    assert held == (inside if gather else set())
    attention = modules["decoder.layers.1.self_attention.core_attention"]
    assert attention.config.fp8_dot_product_attention == (scope == "all")


def test_every_linear_is_told_its_name_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --fp8-param-gather a weight's dtype is decided then, before GPTModel names modules."""
    paths: Counter[str] = Counter()
    real = RecipeConfig.match

    def spy(recipe: RecipeConfig, context: MatchContext) -> Any:
        paths[context.module_path] += 1
        return real(recipe, context)

    monkeypatch.setattr(RecipeConfig, "match", spy)
    for fields in ({}, {"mla_down_proj_fusion": True}, {"q_lora_rank": None}):
        paths.clear()
        model = build("k2-micro", "experts", **fields)
        assert min(paths[name] for name in quantised(model)) >= 2  # MLA builds linear_proj twice


def test_bf16_has_no_recipe_and_quantises_nothing() -> None:
    model = build("k2-micro", None)
    assert model.config.quant_recipe is None
    assert not any(quantised(model, in_context=False).values())


@pytest.mark.parametrize("scope, num_inside", [("experts", 16), ("linear", 36)])
def test_a_stage_of_kimi_k2_at_full_size(scope: str, num_inside: int) -> None:
    """Stage 7 of PP16 x EP16: four MoE layers, 24 of 384 experts, 9 linears a layer."""
    sizes = dict(pipeline_model_parallel_size=16, expert_model_parallel_size=16)
    model = build(
        "kimi-k2", scope, enter_fake_world(7 * 16, 256, **sizes), fp8_param=True,
        pipeline_model_parallel_layout=propose_pipeline_layout(61, 16), **sizes,
    )  # fmt: skip
    runs = quantised(model)
    assert (len(runs), sum(runs.values())) == (36, num_inside)
    experts, others = names(dict.fromkeys(range(4), True))
    assert {name for name, on in runs.items() if on} == (
        experts if scope == "experts" else experts | others
    )


RECOMPUTED: dict[str, Any] = dict(
    recompute_granularity="selective", recompute_modules=["moe_act", "layernorm", "mla_up_proj"]
)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scope", ["experts", "linear"])
def test_the_reports_recomputation_passes_megatrons_checks(recipe: str, scope: str) -> None:
    if recipe == "delayed":
        with pytest.raises(ValueError, match="Delayed scaling does not support moe_act"):
            build("k2-micro", scope, fp8_recipe=recipe, **RECOMPUTED)
        return
    model = build("k2-micro", scope, fp8_recipe=recipe, **RECOMPUTED)
    mlp = model.decoder.layers[1].mlp
    assert mlp.experts.activation_recompute
    # What is recomputed can only be kept as it was given, not in FP8.
    assert mlp.experts.linear_fc2.save_original_input
    assert not mlp.experts.linear_fc1.save_original_input


@pytest.mark.parametrize("name", ["moe_up_proj_input", "swiglu_input"])
def test_storage_in_fp8_takes_our_subclasses(name: str) -> None:
    from megatron_k2.model.te_experts import K2TEMLP, K2TEGroupedMLP, K2TESharedExpertMLP

    fields = dict(k2_fp8_activations=[name], bias_activation_fusion=True)
    model = build("k2-micro", "experts", **fields)
    assert type(model.decoder.layers[0].mlp) is K2TEMLP
    assert type(model.decoder.layers[1].mlp.experts) is K2TEGroupedMLP
    assert type(model.decoder.layers[1].mlp.shared_experts) is K2TESharedExpertMLP
    plain = build("k2-micro", "experts", bias_activation_fusion=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert quantised(model) == quantised(plain)


def settings(**changes: Any) -> SimpleNamespace:
    """Return the fields that ``check_scope`` reads; K2's heads."""
    fields = dict(
        k2_fp8_scope="all", fp8_recipe="mxfp8", fp8_dot_product_attention=True,
        fp8_multi_head_attention=False, qk_clip=False, log_max_attention_logit=False,
        qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128,
    )  # fmt: skip
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k2_fp8_scope="linear"), "--k2-fp8-scope linear keeps the attention's products"),
        (dict(fp8_recipe="blockwise"), "has no attention in --fp8-recipe blockwise"),
        (dict(log_max_attention_logit=True), "does not return the largest logit"),
        (dict(qk_head_dim=192), r"heads of 256 \(query, key\) and 128 \(value\)"),
        (dict(v_head_dim=120), "multiples of 16 up to 192 and 128"),
    ],
)
def test_a_scope_that_cannot_hold_is_refused(changes: dict[str, Any], message: str) -> None:
    check_scope(settings())
    check_scope(settings(k2_fp8_scope="experts", fp8_dot_product_attention=False))
    with pytest.raises(ValueError, match=message):
        check_scope(settings(**changes))


def test_only_the_scope_experts_needs_exceptions() -> None:
    assert [scope_recipe(scope) is None for scope in SCOPES] == [False, True, True]


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="'attention' is not one of experts, linear, all"):
        scope_recipe("attention")
