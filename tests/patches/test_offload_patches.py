"""Activation offloading: what the patches of the host and of upstream's two faults change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_k2
from megatron_k2.offload_arena import FOLDER_VARIABLE
from megatron_k2.patches.cpu import gpu_affinity, host_cuda, host_offload
from megatron_k2.patches.megatron_core import offload_groups

megatron_k2.register("cpu")

from megatron.core.pipeline_parallel import fine_grained_activation_offload as upstream  # noqa: E402

POOL, HANDLER, MANAGER = host_offload.PATCHES
FINISHED, RELOAD_ORDER = offload_groups.PATCHES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a manager and an arena of its own."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    upstream.PipelineOffloadManager.reset_instance()
    return tmp_path


def handler_of(*names: str) -> Any:
    """Return the first microbatch's handler with one group a name, as its forward pass leaves it.

    The first group holds a tensor of 64 numbers and has been offloaded.
    """
    manager = upstream.PipelineOffloadManager.get_instance()
    manager.init_model_chunk_offload_handler(0, None, None, min_offloaded_tensor_size=0)
    handler = manager.cur_forward_chunk()
    for name in names:
        handler.on_group_start_forward(name)
        handler.tensor_push(torch.arange(64.0))
        handler.on_group_commit_forward(name, [])
    return handler


def is_in_a_file(tensor: torch.Tensor, folder: Path) -> bool:
    """Tell whether a tensor lies in a mapping of a file of this folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


def test_pool_takes_its_tensors_from_files_and_takes_them_back(folder: Path) -> None:
    pool = upstream.OffloadTensorPool(device="cpu", pin_memory=True)
    tensor = pool.allocate(torch.Size([3, 5]), torch.bfloat16)
    assert is_in_a_file(tensor, folder) and tensor.shape == (3, 5)
    place = tensor.data_ptr()
    pool.free(tensor)
    assert pool.allocate(torch.Size([7]), torch.float32).data_ptr() == place
    original = POOL.original()(device="cpu", pin_memory=True)
    assert not is_in_a_file(original.allocate((3, 5), torch.bfloat16), folder)


def test_handler_manages_activations_of_the_host_and_no_weights() -> None:
    activation, weight = torch.ones(4), torch.nn.Parameter(torch.ones(4))
    manages = upstream.ChunkOffloadHandler._can_manage_tensor_for_offload
    assert manages(activation) and not manages(weight)
    assert not HANDLER.original()._can_manage_tensor_for_offload(activation)


@pytest.mark.parametrize("name", ["attn_norm", "expert_fc1"])
def test_handler_moves_any_group_to_a_file_and_back(name: str, folder: Path) -> None:
    handler = handler_of(name)
    (tag,) = handler.offload_groups[0]._tensors
    _, kept, _ = handler.offload_groups[0]._tensors[tag]
    assert is_in_a_file(kept, folder)
    returned = handler.tensor_pop(tag)
    assert torch.equal(returned, torch.arange(64.0)) and not is_in_a_file(returned, folder)
    arena = handler.cpu_tensor_pool.arena
    assert arena.free_bytes == arena.mapped_bytes


def test_context_is_entered_without_transformer_engine() -> None:
    handler_of()
    x = torch.arange(3.0, requires_grad=True)
    with upstream.PipelineOffloadManager.get_instance() as nothing:
        assert nothing is None
    original = MANAGER.original()()
    original._cur_forward_chunk = handler_of()
    with pytest.raises(RuntimeError, match="TE CPU offload is not available"):
        original.__enter__()
    assert (x * x).sum().item() == 5  # no hook was left behind


def test_no_core_is_asked_for() -> None:
    from megatron.core.pipeline_parallel import utils

    utils.set_ideal_affinity_for_current_gpu()
    with pytest.raises((RuntimeError, ImportError)):
        gpu_affinity.PATCH.original()()


def test_microbatch_whose_groups_stay_is_not_finished_before_its_last() -> None:
    handler = handler_of("attn_norm", "core_attn")
    handler.reset()
    handler.is_warmup = False
    handler.offload_groups[0].offload = False
    handler.on_group_start_forward("attn_norm")
    handler.on_group_commit_forward("attn_norm", [])
    assert not handler.finish_all_groups("core_attn")
    assert FINISHED.original()(handler, "core_attn"), "delete offload-finished"
    handler.on_group_start_forward("core_attn")
    assert handler.finish_all_groups("attn_norm") and handler.finish_all_groups("core_attn")


def test_early_reload_waits_for_the_offload_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(
        host_cuda.HostStream, "wait_event", lambda self, event: waited.append(event)
    )
    for pop, expected in ((None, 1), (RELOAD_ORDER.original(), 0)):
        handler = handler_of("attn_norm")
        (tag,) = handler.offload_groups[0]._tensors
        waited.clear()
        if pop is None:
            handler.tensor_pop(tag)
            assert waited == [handler.offload_groups[0]._offload_event]
        else:
            pop(handler, tag)
        assert len(waited) == expected, "delete offload-reload-order"


def test_reloaded_and_unmanaged_tensors_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = handler_of("attn_norm")
    handler.bulk_reload()
    (tag,) = handler.offload_groups[0]._tensors
    monkeypatch.setattr(host_cuda.HostStream, "wait_event", None)
    assert torch.equal(handler.tensor_pop(tag), torch.arange(64.0))
    weight = torch.nn.Parameter(torch.ones(2))
    assert handler.tensor_pop(weight) is weight
