"""One process of Megatron on the CPU: gloo, all groups of size one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Initialise torch.distributed and parallel_state for a world of one, and take both down."""
    import megatron_k2

    megatron_k2.register("cpu")
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_k2 import parallel

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()
