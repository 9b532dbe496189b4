"""Products on FP8's grid: kernels, tiles, torch's own scaled product, an fp64 reference, edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_k2.fp8.operands import (
    BLOCKS,
    BLOCKWISE_FP8,
    COLUMNS,
    PLAIN,
    ROWS,
    Tile,
    snap,
    snap_plain,
)
from megatron_k2.fp8.tiles import (
    TILE,
    dequantise,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
)

SHAPES = [(1, 1), (3, 128), (5, 300), (130, 257), (2, 200, 130), (3, 16, 16), (0, 128), (2, 0, 64)]
TILES = [ROWS, COLUMNS, BLOCKS]


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def assert_same(left: Tensor, right: Tensor) -> None:
    """Equal to the bit; any NaN equals any other."""
    assert torch.equal(left.isnan(), right.isnan())
    assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-42, 1e-38, 1e-20, 1e30, 3e38])
def test_kernel_and_plain_torch_agree_to_the_bit(
    tile: Tile, dtype: torch.dtype, size: float
) -> None:
    for seed, shape in enumerate(SHAPES):
        x = numbers(*shape, seed=seed, size=size).to(dtype)
        if x.numel() > 20:
            x.view(-1)[::11], x.view(-1)[3::13], x.view(-1)[5::17] = (
                float("nan"), float("inf"), 0.0,
            )  # fmt: skip
        assert_same(snap(x, tile), snap_plain(x, tile))


def test_a_snapped_matrix_is_the_quantised_one_of_tiles() -> None:
    x = numbers(130, 257)
    assert torch.equal(snap(x, ROWS), dequantise(quantise_rows(x, True), torch.float32))
    assert torch.equal(snap(x, BLOCKS), dequantise(quantise_blocks(x, True), torch.float32))
    assert torch.equal(snap(x, COLUMNS), dequantise(quantise_columns(x, True), torch.float32).t())


@pytest.mark.parametrize("tile", TILES)
def test_every_matrix_of_a_batch_has_tiles_of_its_own(tile: Tile) -> None:
    batch = numbers(3, 150, 140) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    assert torch.equal(snap(batch, tile), torch.stack([snap(one, tile) for one in batch]))


@pytest.mark.parametrize("tile", TILES)
def test_every_number_is_a_bf16_number_and_stays(tile: Tile) -> None:
    found = snap(numbers(130, 257), tile)
    assert torch.equal(found.bfloat16().float(), found)
    assert torch.equal(snap(found, tile), found)


def scaled_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply FP8 by FP8 tile by tile with torch's own scaled product, summed in fp32."""
    total = torch.zeros(len(x), len(weight))
    for first in range(0, x.shape[1], TILE):
        a = quantise_rows(x[:, first : first + TILE], True)
        b = quantise_blocks(weight[:, first : first + TILE], True)
        total += torch._scaled_mm(
            a.data, b.data.t(), a.scales, b.scales.expand(1, len(weight)).contiguous(),
            out_dtype=torch.float32,
        )  # fmt: skip
    return total


def test_the_product_is_that_of_torchs_scaled_mm() -> None:
    x, weight = numbers(96, 512), numbers(64, 512, seed=1)
    found = BLOCKWISE_FP8.rows(x) @ BLOCKWISE_FP8.weight(weight).t()
    # Exact factors, fp32 sums of 512 in another order: each within 512 half-steps of 2^-24 of the
    # sum of sizes, which is at most the product of the norms.
    bound = 2 * 512 * 2.0**-24 * (x.norm(dim=1)[:, None] * weight.norm(dim=1)[None])
    assert ((found - scaled_product(x, weight)).abs() <= bound).all()


def test_products_against_fp64() -> None:
    x, weight, grad = numbers(200, 256), numbers(160, 256, seed=1), numbers(200, 160, seed=2)
    fp8 = BLOCKWISE_FP8
    pairs = [
        (fp8.rows(x), fp8.weight(weight).t(), x, weight.t()),
        (fp8.rows(grad), fp8.weight(weight), grad, weight),
        (fp8.columns(grad).t(), fp8.columns(x), grad.t(), x),
    ]
    for left, right, plain_left, plain_right in pairs:
        wide = left.double() @ right.double()
        found = (left.bfloat16() @ right.bfloat16()).double()
        # One rounding to bf16 (2^-8) of an fp32 sum of exact products.
        sizes = left.double().abs() @ right.double().abs()
        assert ((found - wide).abs() <= wide.abs() * 2.0**-8 + sizes * 256 * 2.0**-24).all()
        # e4m3 is off by at most 2^-4, evenly spread: 2^-4/sqrt(3) each, and two factors.
        exact = plain_left.double() @ plain_right.double()
        assert (found - exact).norm() / exact.norm() <= 2**0.5 * 2**-4 / 3**0.5


def test_plain_operands_are_left_alone() -> None:
    x = numbers(3, 5)
    assert PLAIN.rows(x) is x and PLAIN.columns(x) is x and PLAIN.weight(x) is x


def test_edges_keep_results_finite_and_right() -> None:
    x = torch.zeros(128, 128)
    x[1] = 1e-44  # denormal
    x[2, 5] = float("inf")
    x[3, 6] = float("nan")
    x[4, 0] = 3.2e38
    rows = snap(x, ROWS)
    assert torch.equal(rows[0], x[0]) and rows[1].isfinite().all()
    assert rows[2, 5] == 448.0, "an infinity alone in its tile saturates at scale one"
    assert rows[3].isnan().sum() == 1 and rows[4].isfinite().all()
    blocks = snap(x, BLOCKS)
    assert blocks.isnan().sum() == 1 and blocks.nan_to_num(0.0).isfinite().all()
