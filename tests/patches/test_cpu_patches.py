"""The CPU device layer changes what it claims, inside Megatron's modules only."""

from __future__ import annotations

import logging

import pytest
import torch

import megatron_k2

megatron_k2.register("cpu")


def test_torch_itself_is_untouched() -> None:
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_megatron_sees_the_host_as_its_device() -> None:
    from megatron.core import utils

    view = utils.torch
    assert view is not torch
    assert view.cuda.current_device() == torch.device("cpu")
    assert view.zeros(2, device="cuda").device.type == "cpu"
    assert view.empty(2, device=view.device("cuda", 0), pin_memory=True).device.type == "cpu"
    assert isinstance(torch.device("cpu"), view.device)
    assert view.cuda.memory_stats()["allocated_bytes.all.peak"] > 2**20


def test_modules_imported_after_register_get_the_view_too() -> None:
    from megatron.core import activations

    assert activations.torch is not torch


def test_host_stream_and_event_stand_in_for_cuda_ones() -> None:
    from megatron.core import utils

    cuda = utils.torch.cuda
    with cuda.stream(cuda.Stream()):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        end.record()
        cuda.current_stream().wait_stream(cuda.default_stream())
    assert end.query() and start.elapsed_time(end) >= 0


def test_functions_compiled_at_import_run_as_written() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")


def test_tensor_cuda_returns_the_tensor_itself() -> None:
    tensor = torch.zeros(3)
    assert tensor.cuda() is tensor
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_rng_tracker_forks_the_hosts_generator(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        tracker = CudaRNGStatesTracker()
        tracker.add("fork", seed)
        with tracker.fork("fork"):
            inside = torch.rand(4)
        return inside, torch.rand(4)

    with caplog.at_level(logging.WARNING):
        first, outside = draw(1)
        second, outside_again = draw(2)
    torch.manual_seed(0)
    assert torch.equal(outside, torch.rand(4))
    assert torch.equal(outside, outside_again)
    assert not torch.equal(first, second)
    assert not caplog.records


def test_gradient_clip_takes_a_host_gradient() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 2.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=4.0)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5), rtol=1e-5, atol=0)


def test_clip_scales_in_place_and_alike() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    torch.manual_seed(0)
    grads = [torch.randn(33), torch.randn(4, 5)]
    expected = [torch.empty_like(grad) for grad in grads]
    local_multi_tensor_scale(0, None, [grads, expected], 0.37)
    storage = [grad.data_ptr() for grad in grads]
    clip_grads.multi_tensor_scale_impl(0, None, [grads, grads], 0.37)
    assert [grad.data_ptr() for grad in grads] == storage
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_gpu_packages_are_out_of_sight() -> None:
    for name in ("transformer_engine", "apex", "amp_C"):
        with pytest.raises(ImportError):
            __import__(name)


def test_configuration_is_k2s_for_mla() -> None:
    from megatron.core import transformer

    from megatron_k2.model.config import K2TransformerConfig

    assert transformer.MLATransformerConfig is K2TransformerConfig
