"""The arena of offloaded activations: files without a name, exact bytes, reuse, errors."""

from __future__ import annotations

import argparse
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_k2 import offload_arena
from megatron_k2.offload_arena import (
    OffloadArena,
    block_bytes,
    check_offload_modules,
    too_small_to_offload,
)


def mapped_files(folder: Path) -> list[str]:
    """The mappings of this process whose files were made in a folder."""
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line
    ]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool,
              torch.uint8, torch.float8_e4m3fn],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 5, 7), (4096,), (0, 8), ()])
def test_tensor_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    source = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    source = source.view(dtype).squeeze(-1) if dtype.itemsize > 1 else source.squeeze(-1).to(dtype)
    kept = OffloadArena(tmp_path).take(source.shape, dtype).copy_(source)
    assert kept.is_contiguous() and kept.shape == source.shape and kept.dtype == dtype
    assert torch.equal(kept.reshape(-1).view(torch.uint8), source.reshape(-1).view(torch.uint8))


def test_block_is_at_most_an_eighth_too_large() -> None:
    for num_bytes in [0, 1, 4095, 4096, 4097, *range(5000, 3_000_000, 7919)]:
        size = block_bytes(num_bytes)
        assert size >= num_bytes and size % 4096 == 0
        assert size - num_bytes <= max(4096, num_bytes // 8)
    assert len({block_bytes(num_bytes) for num_bytes in range(1 << 20, 2 << 20, 4096)}) == 9


def test_block_given_back_serves_the_next_request_of_its_size(tmp_path: Path) -> None:
    arena = OffloadArena(tmp_path)
    first, second = arena.take((1000,), torch.float32), arena.take((1000,), torch.float32)
    place = first.data_ptr()
    assert second.data_ptr() != place
    arena.give_back(first)
    assert arena.free_bytes == block_bytes(4000) and arena.mapped_bytes == 2 * block_bytes(4000)
    third = arena.take((2, 999), torch.bfloat16)
    assert third.data_ptr() == place and arena.free_bytes == 0
    assert arena.mapped_bytes == 2 * block_bytes(4000)


def test_files_have_no_name_and_vanish_with_their_tensors(tmp_path: Path) -> None:
    arena = OffloadArena(tmp_path)
    lent = [arena.take((1 << 14,), torch.float32) for _ in range(3)]
    assert list(tmp_path.iterdir()) == []
    assert len(mapped_files(tmp_path)) == 3
    arena.give_back(lent.pop())
    gc.collect()
    assert len(mapped_files(tmp_path)) == 3  # free blocks stay
    del arena, lent
    gc.collect()
    assert mapped_files(tmp_path) == []


def test_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(offload_arena.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/the/default")
    assert offload_arena.offload_folder() == Path("/the/default")
    monkeypatch.setenv(offload_arena.FOLDER_VARIABLE, str(tmp_path))
    assert offload_arena.offload_folder() == tmp_path


@pytest.mark.parametrize("name", ["missing", "file"])
def test_useless_folder_is_refused_with_its_flag(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    offload_arena.check_folder(tmp_path)
    with pytest.raises(ValueError, match=f"--k2-offload-folder .*/{name}: no file can be made"):
        offload_arena.check_folder(tmp_path / name)


@pytest.fixture
def no_file_above_a_mebibyte() -> Iterator[None]:
    """What a full disk does: the kernel refuses to reserve more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_file_above_a_mebibyte")
def test_no_room_is_an_error_with_its_flag_not_a_bus_error(tmp_path: Path) -> None:
    arena = OffloadArena(tmp_path)
    arena.take((1 << 18,), torch.float32).fill_(1)
    wanted = rf"--k2-offload-folder {tmp_path}: no room for {1 << 21} bytes .* beside {1 << 20}"
    with pytest.raises(RuntimeError, match=wanted):
        arena.take((1 << 19,), torch.float32)


def test_modules_that_upstream_would_fail_on_are_refused() -> None:
    check_offload_modules(["qkv_linear", "core_attn"], None, ["mla_up_proj", "core_attn"])
    check_offload_modules(
        ["qkv_linear", "attn_proj", "core_attn"], "selective", ["mla_up_proj", "layernorm"]
    )
    check_offload_modules(["core_attn"], "selective", ["mla_up_proj"])
    with pytest.raises(ValueError, match="needs one of attn_norm, attn_proj beside it"):
        check_offload_modules(["qkv_linear", "core_attn"], "selective", ["mla_up_proj"])
    with pytest.raises(ValueError, match="--offload-modules core_attn: --recompute-modules core_a"):
        check_offload_modules(["core_attn"], "selective", ["core_attn"])
    with pytest.raises(ValueError, match="--recompute-granularity full needs again"):
        check_offload_modules(["attn_norm"], "full", [])


def test_modules_whose_tensors_stay_below_the_smallest_size_are_named() -> None:
    sizes = dict(
        micro_batch_size=1, seq_length=4096, context_parallel_size=1, sequence_parallel=True,
        tensor_model_parallel_size=8, expert_tensor_parallel_size=1, hidden_size=7168,
        num_attention_heads=64, multi_latent_attention=True, qk_head_dim=128,
        qk_pos_emb_head_dim=64, v_head_dim=128, num_experts=384, moe_router_topk=8, swiglu=True,
        moe_ffn_hidden_size=2048, min_offloaded_tensor_size=1 << 20,
        offload_modules=["attn_norm", "core_attn", "attn_proj", "mlp_norm", "moe_act"],
    )  # fmt: skip
    assert too_small_to_offload(argparse.Namespace(**sizes)) == ""  # Kimi K2, in eight
    sizes["context_parallel_size"] = 4
    assert too_small_to_offload(argparse.Namespace(**sizes)).startswith(
        "--offload-modules attn_norm mlp_norm: not offloaded, because their largest tensors, of "
        "917,504, 917,504 elements, are below --min-offloaded-tensor-size 1,048,576"
    )
