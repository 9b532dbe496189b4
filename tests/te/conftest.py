"""Transformer Engine on a machine without a GPU: `make test-te`, in .venv-te.

Its modules construct on the meta device once ``torch.cuda`` claims to be available, and the Python
part of its quantisers runs on the CPU; no kernel does. The tests outside this folder hide it
(tests/conftest.py), so this folder has a lane, and a process, of its own.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_k2.patches.cpu import hide_gpu_packages
from megatron_k2.patches.cpu.host_cuda import HostEvent, HostStream

hide_gpu_packages.PATCH.revert()
if not torch.cuda.is_available():
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    torch.cuda.Stream, torch.cuda.Event = HostStream, HostEvent  # type: ignore[assignment,misc]
    # Blackwell, which has every recipe: Transformer Engine asks when it chooses a default.
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(  # type: ignore[assignment]
        major=10, minor=0, multi_processor_count=148, name="none"
    )

try:
    import transformer_engine.pytorch  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:
    pytest.exit(f"Transformer Engine does not import here ({error}); run make test-te", 1)
