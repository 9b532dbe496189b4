"""e4m3 tiles: kernels and plain torch agree to the bit, errors are bounded, edges are harmless."""

from __future__ import annotations

import pytest
import torch

from megatron_k2.fp8 import host_kernels
from megatron_k2.fp8.tiles import (
    MIN_SCALE,
    Tiles,
    dequantise,
    dequantise_rows_plain,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    quantise_rows_plain,
)

SHAPES = [(1, 1), (3, 128), (5, 300), (130, 257), (16, 512)]


def test_the_compiler_of_this_machine_makes_the_kernels() -> None:
    assert host_kernels.library() is not None, host_kernels.describe()


def test_the_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_K2_HOST_KERNELS", "off")
    host_kernels.library.cache_clear()
    try:
        assert host_kernels.library() is None and "plain torch" in host_kernels.describe()
        x = torch.randn(4, 200)
        assert torch.equal(quantise_rows(x).scales, quantise_rows_plain(x).scales)
    finally:
        host_kernels.library.cache_clear()


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal to the bit; any NaN equals any other."""
    assert torch.equal(left.isnan(), right.isnan())
    assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-42, 1e-38, 1e-20, 1e30, 3e38])
def test_kernels_and_plain_torch_agree_to_the_bit(
    dtype: torch.dtype, size: float, power_of_two: bool
) -> None:
    for seed, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(size).to(dtype)
        x.view(-1)[seed :: 7 + seed] = torch.tensor([float("nan"), float("inf"), -0.0])[seed % 3]
        fast, plain = quantise_rows(x, power_of_two), quantise_rows_plain(x, power_of_two)
        assert torch.equal(fast.scales, plain.scales)
        assert_same(fast.data.float(), plain.data.float())
        assert_same(dequantise(fast, dtype), dequantise_rows_plain(plain.data, plain.scales, dtype))


@pytest.mark.parametrize("exponent", [-126, -60, -52, -51, -50, 0, 60, 127])
def test_whole_tiles_divide_every_bf16_number_by_every_scale_as_torch_does(exponent: int) -> None:
    # A tile's scale is its largest number / 448: 128 mantissas; all numbers down to 2^-20 of it,
    # which is 2^-11 of the scale, a quarter of e4m3's least step.
    one = int(torch.tensor(1.0).bfloat16().view(torch.int16)) + exponent * 128
    bits = torch.arange(max(one - 20 * 128, 0), one + 128, dtype=torch.int16)
    largest = torch.arange(one, one + 128, dtype=torch.int16)
    columns = -(-len(bits) // 127)
    numbers = torch.nn.functional.pad(bits, (0, columns * 127 - len(bits))).view(columns, 127)
    tiles = numbers.expand(128, columns, 127).minimum(largest[:, None, None])
    tiles = torch.cat([tiles, largest[:, None, None].expand(128, columns, 1)], -1)
    x = tiles.reshape(128, columns * 128).view(torch.bfloat16)
    for signed in (x, -x):
        for power_of_two in (False, True):
            fast, plain = (f(signed, power_of_two) for f in (quantise_rows, quantise_rows_plain))
            assert torch.equal(fast.scales, plain.scales)
            assert torch.equal(fast.data.view(torch.uint8), plain.data.view(torch.uint8))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_number_is_within_half_a_step_of_its_grid(power_of_two: bool) -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(3)).double()
    x *= torch.logspace(-9, 9, 1000, dtype=torch.float64)
    tiles = quantise_rows(x.float(), power_of_two)
    scales = tiles.scales.double().repeat_interleave(128, 1)[:, :1000]
    error = (tiles.data.double() * scales - x.float().double()).abs()
    # e4m3: 3 bits of mantissa, so half a step is 2^-4 of the number; 2^-10 below 2^-6.
    bound = torch.maximum(x.abs() * 2**-4, scales * 2**-10) * (1 + 1e-6)
    assert (error <= bound).all()


def test_a_power_of_two_scale_dequantises_without_rounding() -> None:
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(4))
    for tiles in (quantise_rows(x, True), quantise_blocks(x, True)):
        mantissa, _ = torch.frexp(tiles.scales)
        assert (mantissa == 0.5).all()
        assert torch.equal(dequantise(tiles).float(), dequantise(tiles, torch.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_and_columns_against_a_loop_over_tiles(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    blocks, columns = quantise_blocks(x), quantise_columns(x)
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            tile = x[row : row + 128, column : column + 128]
            scale = tile.abs().max() / 448
            assert blocks.scales[row // 128, column // 128] == scale
            found = blocks.data[row : row + 128, column : column + 128]
            assert torch.equal(found.float(), (tile / scale).to(torch.float8_e4m3fn).float())
    for column in range(shape[1]):
        tile = x[:128, column]
        assert columns.scales[column, 0] == tile.abs().max() / 448
    assert columns.data.shape == shape[::-1]


def test_storage_is_one_byte_and_a_scale_a_tile() -> None:
    x = torch.randn(64, 1024).bfloat16()
    assert quantise_rows(x).num_bytes == x.numel() + 4 * x.numel() // 128
    assert quantise_rows(x).num_bytes / x.nbytes < 0.52


def test_edges_keep_results_finite_and_right() -> None:
    x = torch.zeros(6, 128)
    x[1] = 1e-44  # denormal
    x[2], x[2, 5] = 2.0, float("inf")
    x[3], x[3, 6] = -3.0, float("nan")
    x[4, 0] = 3.4e38
    x[5] = MIN_SCALE
    found = dequantise(quantise_rows(x), torch.float32)
    assert torch.equal(found[0], x[0])
    assert (found[1] - x[1]).abs().max() <= MIN_SCALE * 2**-10
    assert found[2, 5] == 2.0, "an infinity saturates at the largest of its tile"
    assert torch.equal(found[2, :5], x[2, :5])
    assert found[3].isnan().sum() == 1 and found[3, 6].isnan()
    assert torch.equal(found[3, :6], x[3, :6])
    assert found[4].isfinite().all() and found[4, 0] > 3.3e38
    assert torch.equal(found[5], x[5])


def test_no_rows_make_no_tiles() -> None:
    tiles = quantise_rows(torch.empty(0, 256))
    assert tiles == Tiles(tiles.data, tiles.scales) and dequantise(tiles).shape == (0, 256)


def test_a_folder_that_cannot_be_written_means_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    host_kernels.library.cache_clear()
    try:
        assert host_kernels.library() is None and "XDG_CACHE_HOME" in host_kernels.describe()
        x = torch.randn(4, 200)
        assert torch.equal(quantise_rows(x).scales, quantise_rows_plain(x).scales)
    finally:
        host_kernels.library.cache_clear()
