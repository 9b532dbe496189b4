"""Our e4m3 tiles against Transformer Engine's own Python: bit for bit.

Transformer Engine 2.20's wheel has no Python reference of its blockwise quantiser (its repository
has one among its tests); it has one of a whole tensor with one scale, whose rule for scales is the
blockwise kernel's: 448 / amax, rounded down to a power of two. A tile is a tensor with one scale.
What the wheel has for tiles is their layout and dequantisation, in plain torch.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_engine.pytorch import DType, custom_recipes
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import (
    CurrentScalingQuantizerRef,
)
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
    Float8BlockwiseQTensorStorage,
)

from megatron_k2.fp8.tiles import (
    E4M3,
    E4M3_MAX,
    MIN_SCALE,
    TILE,
    Tiles,
    dequantise,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    quantise_rows_plain,
)

SHAPES = [(3, 128), (5, 300), (130, 257), (16, 512), (1, 1)]
REFERENCE = CurrentScalingQuantizerRef(E4M3, columnwise=False, pow_2_scales=True)


def numbers(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Return normal numbers whose rows are of sizes from 2^-60 to 2^60, with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-60, 61, (shape[0], 1), generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return x.to(dtype)


def reference_tiles(x: Tensor, tall: int) -> tuple[Tensor, Tensor]:
    """Quantise tile by tile with Transformer Engine's reference; tiles of ``tall`` x 128."""
    data = torch.empty(x.shape, dtype=E4M3)
    scales = torch.empty(-(-x.shape[0] // tall), -(-x.shape[1] // TILE))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * tall, (i + 1) * tall), slice(j * TILE, (j + 1) * TILE)
            tile = REFERENCE.quantize(x[at].contiguous())
            data[at], scales[i, j] = tile.data, tile.scale
    return data, scales


def same(tiles: Tiles, reference: tuple[Tensor, Tensor]) -> None:
    """Assert equal bits, of NaN too."""
    assert torch.equal(tiles.scales, reference[1])
    assert torch.equal(tiles.data.view(torch.uint8), reference[0].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_transformer_engines(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    for quantise in (quantise_rows, quantise_rows_plain):
        same(quantise(x, power_of_two=True), reference_tiles(x, 1))
    same(quantise_blocks(x, power_of_two=True), reference_tiles(x, TILE))
    columns = quantise_columns(x, power_of_two=True)
    same(columns, reference_tiles(x.t().contiguous(), 1))


def test_scales_are_transformer_engines_for_every_bf16_maximum() -> None:
    """All positive bf16 numbers from the least whose scale is no less than ours can be."""
    every = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    every = every[every.float() > E4M3_MAX * MIN_SCALE / 2]
    assert len(every) > 31_000
    reference = [REFERENCE.compute_scale(amax, E4M3, pow_2_scales=True)[1] for amax in every]
    found = quantise_rows(every[:, None].contiguous(), power_of_two=True)
    assert torch.equal(found.scales, torch.stack(reference))


@pytest.mark.parametrize("exponent", [-20, 0, 7])
def test_scales_beside_a_power_of_two_are_transformer_engines(exponent: int) -> None:
    """fp32 maxima one step around 448 x 2^n, where a division's rounding could decide."""
    at = torch.tensor(E4M3_MAX * 2.0**exponent)
    amax = torch.stack([torch.nextafter(at, torch.tensor(0.0)), at, torch.nextafter(at, at * 2)])
    x = amax[:, None].expand(3, TILE).contiguous()
    same(quantise_rows(x, power_of_two=True), reference_tiles(x, 1))
    assert quantise_rows(x, power_of_two=True).scales.flatten().tolist() == [
        2.0**exponent, 2.0**exponent, 2.0 ** (exponent + 1)
    ]  # fmt: skip


def test_zero_tiles_and_their_scale_are_transformer_engines() -> None:
    x = torch.zeros(3, 300, dtype=torch.bfloat16)
    x[1, 140] = -3.0
    same(quantise_rows(x, power_of_two=True), reference_tiles(x, 1))


def test_tiny_tiles_differ_by_a_scale_of_at_most_two() -> None:
    """Below 448 x 2^-127 ours keep the least normal scale; the reference goes to 2^-127."""
    x = torch.full((1, TILE), 2.0**-125, dtype=torch.bfloat16)
    ours, reference = quantise_rows(x, power_of_two=True), reference_tiles(x, 1)
    assert ours.scales.item() == MIN_SCALE == 2 * reference[1].item()
    back = reference[0].float() * reference[1]
    assert torch.equal(dequantise(ours, torch.float32), back)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_spoils_its_tile_there_and_only_itself_here(bad: float) -> None:
    x = numbers((2, 2 * TILE))
    x[0, 5] = bad
    ours, (data, scales) = quantise_rows(x, power_of_two=True), reference_tiles(x, 1)
    theirs = data.float() * scales.repeat_interleave(TILE, 1)
    close = (theirs - x.float()).abs() <= x.float().abs() / 16  # e4m3's largest relative step
    assert not close[0, :TILE][x[0, :TILE] != 0].any() and close[1].all()
    back = dequantise(ours, torch.float32)
    assert (
        back[0, 5].isnan()
        if bad != bad
        else back[0, 5] == ours.scales[0, 0] * E4M3_MAX * (1 if bad > 0 else -1)
    )
    assert back[0, torch.arange(2 * TILE) != 5].isfinite().all()
    # Every other tile is the same.
    assert torch.equal(back[0, TILE:], theirs[0, TILE:]) and torch.equal(back[1], theirs[1])


def storage(x: Tensor, tiles: Tiles) -> Float8BlockwiseQTensorStorage:
    """Put our tiles into Transformer Engine's tensor, in its layout of scales."""
    dim = 2 if tiles.is_blocks else 1
    quantizer = Float8BlockQuantizer(
        DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=dim
    )
    scales = tiles.scales if tiles.is_blocks else tiles.scales.t()
    padded = torch.zeros(quantizer.get_scale_shape(x.shape, columnwise=False))
    assert padded.shape[0] == scales.shape[0] and 0 <= padded.shape[1] - scales.shape[1] < 4
    padded[:, : scales.shape[1]] = scales
    return Float8BlockwiseQTensorStorage(
        tiles.data.view(torch.uint8), padded, None, None, DType.kFloat8E4M3, quantizer, dim == 2,
        fake_dtype=x.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_its_tensors_hold_our_tiles_and_give_our_numbers(
    shape: tuple[int, int], power_of_two: bool
) -> None:
    x = numbers(shape)
    for quantise in (quantise_rows, quantise_blocks):
        tiles = quantise(x, power_of_two)
        for dtype in (torch.bfloat16, torch.float32):
            theirs = storage(x, tiles).dequantize(dtype=dtype)
            assert torch.equal(theirs, dequantise(tiles, dtype))


def test_its_recipe_says_what_we_take() -> None:
    from transformer_engine.common.recipe import Float8BlockScaling

    recipe = Float8BlockScaling()
    dims = recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim
    assert dims == (1, 2, 1)
    for params in (
        recipe.fp8_quant_fwd_inp,
        recipe.fp8_quant_fwd_weight,
        recipe.fp8_quant_bwd_grad,
    ):
        assert params.power_2_scale and params.amax_epsilon == 0.0


def test_the_wheel_has_no_blockwise_reference() -> None:
    """When this fails, compare with what it has got instead."""
    found = {module.name for module in pkgutil.iter_modules(custom_recipes.__path__)}
    references = {name for name in found if name.startswith("reference_")}
    assert references == {"reference_current_scaling", "reference_nvfp4", "reference_utils"}


@pytest.mark.parametrize("shape", [*SHAPES, (384, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_are_those_of_its_repositorys_reference(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = os.environ.get("TRANSFORMER_ENGINE_SOURCE")
    if checkout is None:
        pytest.skip("TRANSFORMER_ENGINE_SOURCE names no checkout of NVIDIA/TransformerEngine v2.20")
    monkeypatch.syspath_prepend(Path(checkout) / "tests" / "pytorch")
    module = importlib.import_module("references.blockwise_quantizer_reference")
    quantise, x = module.BlockwiseQuantizerReference().quantize, numbers(shape, dtype)
    rows, columns = shape
    found = quantise(x, E4M3, return_transpose=True, pow_2_scales=True, quant_tile_shape=(1, TILE))
    same(quantise_rows(x, True), (found.data, found.scale[:, :rows].t()))
    same(quantise_columns(x, True), (found.data_t, found.scale_t[:, :columns].t()))
    found = quantise(x, E4M3, pow_2_scales=True, quant_tile_shape=(TILE, TILE))
    same(quantise_blocks(x, True), (found.data, found.scale[:, : -(-columns // TILE)]))
