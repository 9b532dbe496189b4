"""Experts and projections in blockwise FP8 against a slow twin, and who computes so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_k2.fp8.operands import BLOCKWISE_FP8 as FP8
from megatron_k2.fp8.operands import PLAIN
from megatron_k2.model.grouped_gemm import plan_rows
from megatron_k2.model.grouped_mlp import grouped_swiglu_mlp
from megatron_k2.model.swiglu import swiglu_backward, swiglu_forward
from tests.unit.model.tiny import build_model, tiny_config

HIDDEN, FFN = 192, 160
ROWS = [150, 0, 17, 1, 260, 128]
BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}


def operands_of(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def make(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype).requires_grad_()

    return {
        "x": make(sum(ROWS), HIDDEN),
        "probs": torch.rand(sum(ROWS), generator=generator).requires_grad_(),
        "fc1": make(len(ROWS), 2 * FFN, HIDDEN, size=HIDDEN**-0.5),
        "fc2": make(len(ROWS), HIDDEN, FFN, size=FFN**-0.5),
    }


def twin(tensors: dict[str, Tensor], grad_y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Every expert alone, unpadded, each operand quantised where its product is taken."""
    x, probs, fc1, fc2 = (t.detach() for t in tensors.values())
    y = torch.zeros_like(x)
    grads = {name: torch.zeros_like(t) for name, t in tensors.items()}
    for expert, part in enumerate(torch.arange(len(x)).split(ROWS)):
        if not len(part):
            continue
        rows, weight, dy = x[part], probs[part], grad_y[part]
        w1, w2 = FP8.weight(fc1[expert]), FP8.weight(fc2[expert])
        z = FP8.rows(rows) @ w1.t()
        h = swiglu_forward(z, weight)
        y[part] = FP8.rows(h) @ w2.t()
        dz, dp, h = swiglu_backward(FP8.rows(dy) @ w2, z, weight)
        grads["x"][part] = FP8.rows(dz) @ w1
        grads["probs"][part] = dp
        grads["fc1"][expert] = FP8.columns(dz).t() @ FP8.columns(rows)
        grads["fc2"][expert] = FP8.columns(dy).t() @ FP8.columns(h)
    return y, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_each_expert_alone(dtype: torch.dtype) -> None:
    tensors = operands_of(dtype)
    y = grouped_swiglu_mlp(
        *tensors.values(), plan_rows(ROWS, tensors["x"], batched=True), operands=FP8
    )
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(grad_y)
    expected, gradients = twin(tensors, grad_y)
    # The same numbers summed in another order; a last bit can move an intermediate by one step
    # of e4m3, 1/16 of itself, in few places.
    tolerance = 2e-3 if dtype == torch.float32 else 1e-2
    for name, found, want in [("y", y.detach(), expected)] + [
        (name, tensors[name].grad, gradients[name]) for name in tensors
    ]:
        assert (found - want).norm() <= tolerance * want.norm(), name
        assert found.isfinite().all(), name
    assert tensors["fc1"].grad[1].count_nonzero() == 0, "an expert without rows"


def test_what_is_beside_an_expert_does_not_move_its_scales() -> None:
    tensors = operands_of(torch.float32)
    huge = {name: t.detach().clone() for name, t in tensors.items()}
    first = sum(ROWS[:4])
    huge["x"][first:] *= 1e4  # the last two experts'
    found = []
    for values in (tensors, huge):
        values = {name: t.detach().requires_grad_() for name, t in values.items()}
        plan = plan_rows(ROWS, values["x"], batched=True)
        grouped_swiglu_mlp(*values.values(), plan, operands=FP8).sum().backward()
        found.append((values["fc1"].grad[:4], values["fc2"].grad[:4], values["x"].grad[:first]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_storage_in_fp8_and_products_in_fp8_compose() -> None:
    tensors = operands_of(torch.float32)
    plan = plan_rows(ROWS, tensors["x"], batched=True)
    both = frozenset({"moe_up_proj_input", "swiglu_input"})
    plain = grouped_swiglu_mlp(*tensors.values(), plan, operands=FP8)
    stored = grouped_swiglu_mlp(*tensors.values(), plan, None, both, FP8)
    assert torch.equal(plain, stored), "storage touches the backward pass only"
    stored.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors.values())


def computing_in_fp8(model: Any) -> list[str]:
    return sorted(
        name.removeprefix("decoder.layers.")
        for name, module in model.named_modules()
        if getattr(module, "operands", PLAIN).is_fp8
    )


@pytest.mark.usefixtures("single_process")
class TestModel:
    def test_scope_experts_is_routed_and_shared_experts(self) -> None:
        model = build_model(tiny_config(**BLOCKWISE))
        shared = [
            f"{layer}.mlp.shared_experts.linear_{fc}" for layer in (1, 2) for fc in ("fc1", "fc2")
        ]
        assert computing_in_fp8(model) == sorted(["1.mlp.experts", "2.mlp.experts", *shared])

    def test_scope_linear_is_every_projection(self) -> None:
        found = computing_in_fp8(build_model(tiny_config(**BLOCKWISE, k2_fp8_scope="linear")))
        names = {name.split(".", 1)[1] for name in found if name.startswith("0.")}
        attention = ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")
        assert names == {f"self_attention.linear_{name}" for name in attention} | {
            "mlp.linear_fc1", "mlp.linear_fc2",
        }  # fmt: skip
        assert len(found) == 7 + 2 * (5 + 1 + 2)

    def test_first_and_last_layers_can_stay_in_bf16(self) -> None:
        fields = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1}
        model = build_model(
            tiny_config(**BLOCKWISE, **fields, num_layers_at_end_in_bf16=1, k2_fp8_scope="linear")
        )
        assert {name.split(".")[0] for name in computing_in_fp8(model)} == {"1"}

    @pytest.mark.parametrize("scope", ["experts", "linear"])
    def test_a_model_in_fp8_is_near_the_plain_one_and_differs(self, scope: str) -> None:
        found = {}
        for fields in ({}, {**BLOCKWISE, "k2_fp8_scope": scope}):
            torch.manual_seed(0)
            model = build_model(tiny_config(**fields))
            tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))
            positions = torch.arange(24).expand(2, -1)
            loss = model(tokens, positions, None, labels=tokens).mean()
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            found[bool(fields)] = loss.item(), gradients
        (plain, plain_grads), (fp8, fp8_grads) = found[False], found[True]
        assert plain != fp8 and abs(fp8 - plain) < 0.01 * plain
        for name, gradient in fp8_grads.items():
            assert gradient.isfinite().all(), name
            want = plain_grads[name]
            # Twice two factors of 3.6 % a product, through three layers' products.
            if want.norm() > 1e-4:
                assert (gradient - want).norm() < 0.3 * want.norm(), name

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"fp8": "e4m3"}, "--fp8-recipe delayed needs"),
            ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, "--fp8-format hybrid needs"),
            ({**BLOCKWISE, "k2_fp8_scope": "all"}, "--k2-fp8-scope all needs"),
            ({**BLOCKWISE, "fp8_param": True}, "--fp8-param-gather"),
            ({"k2_fp8_scope": "router"}, "--k2-fp8-scope 'router' is not one of"),
        ],
    )
    def test_what_is_not_emulated_is_refused(self, fields: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_config(**fields)
