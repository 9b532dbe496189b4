"""Block FP8: every code under many scales equals torch's float8 and the fp32 rule, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_k2.checkpoint import fp8_blocks
from megatron_k2.checkpoint.fp8_blocks import BLOCK, EXACT_SCALES, num_blocks
from megatron_k2.fp8 import host_kernels

CODES = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])  # without NaN
TINIEST = np.float32(2.0**-149)
LARGEST = np.float32(np.finfo(np.float32).max)
SPECIAL_SCALES = np.float32(
    [
        0.0, TINIEST, 2.0**-133, 2.0**-127, 2.0**-126, 1.5 * 2.0**-126, 2.0**-120, 2.0**-100,
        1e-4, 1.0, 1.0 + 2.0**-7, 1.0 + 2.0**-8, 1.0 + 2.0**-23, 448.0, 2.0**7, 2.0**7 + 1,
        2.0**100, 2.0**120, LARGEST, -1e-3,
    ]
)  # fmt: skip
"""fp32's and bf16's edges, products that are ties, overflow, and both sides of the fast path."""


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim holds for the compiled kernels and for NumPy."""
    if request.param == "numpy":
        monkeypatch.setattr(host_kernels, "library", lambda: None)
    else:
        assert host_kernels.library() is not None, host_kernels.describe()


def dequantised(bits: NDArray, scales: NDArray) -> NDArray:
    out = np.empty(bits.shape, np.uint16)
    fp8_blocks.dequantise(bits, scales.astype(np.float32), out)
    return out


def saturates(values: torch.Tensor, scales: NDArray) -> bool:
    out = np.empty(values.shape, np.uint8)
    return fp8_blocks.quantise(bf16_bits(values), scales.astype(np.float32), out)


def quantised(values: NDArray, scales: NDArray) -> NDArray:
    out = np.empty(values.shape, np.uint8)
    fp8_blocks.quantise(values, scales.astype(np.float32), out)
    return out


def bf16_bits(values: torch.Tensor) -> NDArray:
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def by_the_rule(bits: NDArray, scales: NDArray) -> NDArray:
    """Return bf16(fp32(e4m3) * scale) by torch, block by block."""
    wide = torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).float()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            rows, columns = (slice(i * BLOCK, i * BLOCK + BLOCK) for i in (row, column))
            wide[rows, columns] *= torch.tensor(scales[row, column])
    return bf16_bits(wide)


def many_scales(count: int) -> NDArray:
    """Return scales of all exponents, some of few bits, which make ties."""
    generator = np.random.default_rng(1)
    wide = generator.integers(0, 0x7F80_0000, count, np.uint32)
    wide[::3] &= np.uint32(0xFFFF_8000)
    return np.concatenate([SPECIAL_SCALES, wide.view(np.float32)])


def test_every_code_decodes_as_torch_does() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    found = fp8_blocks.decode_e4m3(codes)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[:128]), np.zeros(128))  # -0 stays -0
    assert found[0x80] == 0 and np.signbit(found[0x80])


@pytest.mark.parametrize("together", [True, False], ids=["in one matrix", "each alone"])
def test_every_code_times_every_scale_is_the_fp32_rule(together: bool) -> None:
    scales = many_scales(2000)
    if together:  # an inexact scale must not change the path of its neighbours' values
        bits = np.tile(CODES, (len(scales), 1))[:, :BLOCK].copy()
        bits = np.repeat(bits[: len(scales) // 8], BLOCK, axis=0)[:, :BLOCK]
        bits = np.random.default_rng(2).permuted(np.resize(CODES, bits.shape), axis=1)
        groups = [(bits, scales[: len(bits) // BLOCK, None])]
    else:
        row = np.resize(CODES, (2, BLOCK))
        groups = [(row, np.float32([[scale]])) for scale in scales]
    for bits, group in groups:
        with np.errstate(over="ignore"):
            found = dequantised(bits, group)
        assert np.array_equal(found, by_the_rule(bits, group)), group.ravel()[:3]


def test_products_half_way_between_two_bf16_numbers_go_to_even() -> None:
    # 15 * (1 + 2^-7 + ...) has more bits than bf16 keeps; scales of up to 12 bits make exact ties.
    mantissas = np.arange(1 << 11, 1 << 12, dtype=np.float32) * np.float32(2.0**-11)
    ties = 0
    for first in range(0, len(mantissas), 16):
        scales = mantissas[first : first + 16][None, :]
        bits = np.resize(CODES, (2, BLOCK * scales.shape[1]))
        products = fp8_blocks.decode_e4m3(bits) * np.repeat(scales, BLOCK, axis=1)
        ties += int(((products.view(np.uint32) & 0xFFFF) == 0x8000).sum())
        assert np.array_equal(dequantised(bits, scales), by_the_rule(bits, scales))
    assert ties > 1000


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 129), (127, 128), (128, 1), (129, 127), (256, 384), (300, 141), (17, 999)]
)
def test_cut_blocks_at_the_edges_take_their_own_scale(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(shape[0])
    bits = generator.choice(CODES, shape)
    scales = generator.random(num_blocks(shape), np.float32) * np.float32(1e-3)
    assert num_blocks(shape) == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert np.array_equal(dequantised(bits, scales), by_the_rule(bits, scales))
    values = bf16_bits(torch.from_numpy(generator.standard_normal(shape)))
    scales = fp8_blocks.block_scales(values)
    wide = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = wide[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            assert scales[row, column] == np.float32(block.abs().max()) / np.float32(448)
            block /= torch.tensor(scales[row, column])
    expected = wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(quantised(values, scales), expected)


def test_every_bf16_and_many_fp32_values_encode_as_torch_with_saturation() -> None:
    every_bf16 = np.arange(1 << 16, dtype=np.uint32) << 16
    half_ways = fp8_blocks.decode_e4m3(CODES[:126])
    half_ways = ((half_ways[:-1].astype(np.float64) + half_ways[1:]) / 2).astype(np.float32)
    near = [np.nextafter(half_ways, np.float32(sign)) for sign in (-1e9, 1e9)]
    random = np.random.default_rng(3).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    values = np.concatenate([every_bf16.view(np.float32), half_ways, *near, -half_ways, random])
    values = values[~np.isnan(values)]
    saturated = torch.from_numpy(values).clamp(-448, 448)
    expected = saturated.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(fp8_blocks.encode_e4m3(values.copy()), expected)


def test_every_code_comes_back_through_encode() -> None:
    assert np.array_equal(fp8_blocks.encode_e4m3(fp8_blocks.decode_e4m3(CODES)), CODES)


def test_rounding_to_bf16_is_torchs() -> None:
    bits = np.random.default_rng(4).integers(0, 1 << 32, 500_000, np.uint32)
    bits[::5] = (bits[::5] & np.uint32(0xFFFF_0000)) | np.uint32(0x8000)  # ties
    values = bits.view(np.float32)
    expected = bf16_bits(torch.from_numpy(values.copy()))
    found = fp8_blocks.round_to_bf16(values)
    numbers = ~np.isnan(values)
    assert np.array_equal(found[numbers], expected[numbers])
    assert ((found[~numbers] & 0x7FFF) > 0x7F80).all()


def test_original_scales_bring_every_byte_back_where_they_say_so() -> None:
    low, high = EXACT_SCALES
    exponents = np.float32(2.0) ** np.arange(-100, 100, dtype=np.float32)
    mantissas = np.random.default_rng(5).random(len(exponents), np.float32) + np.float32(1)
    for scales in (exponents, exponents * mantissas, np.float32([low, high])):
        assert fp8_blocks.scales_are_exact(scales)
        for scale in scales:
            block = np.float32([[scale]])
            bits = np.resize(CODES, (2, BLOCK))
            assert np.array_equal(quantised(dequantised(bits, block), block), bits), scale


@pytest.mark.parametrize("scale", [0.0, TINIEST, 2.0**-130, LARGEST, -1e-3])
def test_scales_outside_are_not_said_to_be_exact(scale: float) -> None:
    assert not fp8_blocks.scales_are_exact(np.float32([[1e-3, scale]]))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scale_that_is_no_number_is_refused(scale: float) -> None:
    scales = np.float32([[1e-3, scale]])
    assert not fp8_blocks.scales_are_exact(scales)
    with pytest.raises(ValueError, match="a scale is NaN or infinite"):
        dequantised(np.zeros((2, 200), np.uint8), scales)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [(0, 0), (16, 130), (299, 140)])
def test_nan_is_refused_wherever_it_lies(code: int, place: tuple[int, int]) -> None:
    bits = np.zeros((300, 141), np.uint8)
    bits[place] = code
    with pytest.raises(ValueError, match="NaN") as raised:
        dequantised(bits, np.ones((3, 2)))
    first, last = map(int, str(raised.value).split("rows ")[1].split(" is")[0].split(" to "))
    assert first <= place[0] <= last
    values = np.zeros((300, 141), np.uint16)
    for wrong in (0x7FC0, 0xFF81, 0x7F80, 0xFF80):  # NaN and infinity
        values[place] = wrong
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantised(values, np.ones((3, 2)))
        with pytest.raises(ValueError, match="NaN or infinite"):
            fp8_blocks.block_scales(values)


def test_a_block_of_zeros_keeps_its_signs_with_scale_zero_and_gets_scale_one() -> None:
    zeros = np.resize(np.uint8([0, 0x80]), (4, BLOCK))
    back = quantised(dequantised(zeros, np.zeros((1, 1))), np.zeros((1, 1)))
    assert np.array_equal(back, zeros)
    assert fp8_blocks.block_scales(np.zeros((4, BLOCK), np.uint16)).tolist() == [[1.0]]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_beyond_rounding_of_the_largest_code_is_said_to_saturate(sign: int) -> None:
    values = torch.zeros(300, 141)
    scales = np.full((3, 2), 0.5, np.float32)
    for place in ((0, 0), (299, 140), (128, 127)):
        for size, expected in ((448.0, False), (464.0, False), (466.0, True), (3e38, True)):
            values[place] = sign * size * 0.5
            assert saturates(values, scales) == expected, (place, size)
        values[place] = 0
    assert not saturates(values, np.zeros((3, 2)))
    values[299, 140] = sign * 1e-30  # becomes zero
    scales[2, 1] = 0
    assert saturates(values, scales)


def test_fresh_scales_use_the_whole_range_and_lose_at_most_half_a_step() -> None:
    generator = torch.Generator().manual_seed(6)
    values = bf16_bits(torch.randn(300, 260, generator=generator) * 0.02)
    scales = fp8_blocks.block_scales(values)
    codes = quantised(values, scales)
    assert (codes & 0x7F).max() == 0x7E  # 448
    wide = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).double().numpy()
    again = torch.from_numpy(dequantised(codes, scales).view(np.int16)).view(torch.bfloat16)
    spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:300, :260].astype(np.float64)
    # Half a step is 2^-4 of the value, or 2^-10 of the scale below e4m3's smallest normal number;
    # bf16 rounds once more, by 2^-9.
    bound = np.maximum(np.abs(wide) * (2**-4 + 2**-8), spread * 2**-9.9)
    assert (np.abs(again.double().numpy() - wide) <= bound).all()
