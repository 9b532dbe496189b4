"""What ``torch.cuda`` means to Megatron when the device is the host.

Megatron asks ``torch.cuda`` for a device, streams, events, memory figures and generator state in
some 450 places. On the host there is one device, every operation is finished when it returns, and
the CUDA generator is the CPU's. ``HostCuda`` answers exactly that; what it does not know it passes
on to the real ``torch.cuda``, so that a use nobody thought of fails as loudly as before.
Source of the list: a search of megatron-core 0.19.2 for ``torch.cuda.``.
"""

from __future__ import annotations

import contextlib
import resource
import time
import types
from typing import Any

import torch

HOST = torch.device("cpu")
# bf16 and grouped GEMM, as compute capability 8.0 has; no FP8, which begins at 8.9.
CAPABILITY = (8, 0)


class HostStream:
    """A stream that is always idle, since host operations are synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = HOST
        self.cuda_stream = 0

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostStream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        """Return True: no work is ever pending."""
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record and return an event; it is complete at once."""
        event = event or HostEvent()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the one priority of the host."""
        return (0, 0)


class HostEvent:
    """An event that is complete when recorded; keeps the wall clock for ``elapsed_time``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_s = 0.0

    def record(self, stream: HostStream | None = None) -> None:
        """Take the time."""
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Return the milliseconds between two events, as CUDA's does."""
        return (end._recorded_s - self._recorded_s) * 1e3

    def query(self) -> bool:
        """Return True: a recorded event is complete."""
        return True

    def wait(self, stream: HostStream | None = None) -> None:
        """Return at once."""

    synchronize = wait


def _peak_bytes(*args: Any, **kwargs: Any) -> int:
    """Return the peak resident memory of this process in bytes (Linux reports KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes(*args: Any, **kwargs: Any) -> int:
    """Return the present resident memory of this process in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _memory_stats(*args: Any, **kwargs: Any) -> dict[str, int]:
    """Return the entries of CUDA's allocator statistics that Megatron logs, from the host's."""
    return {
        "allocated_bytes.all.current": _resident_bytes(),
        "allocated_bytes.all.peak": _peak_bytes(),
        "reserved_bytes.all.current": _resident_bytes(),
        "reserved_bytes.all.peak": _peak_bytes(),
        "allocation.all.current": 0,
        "num_alloc_retries": 0,
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _stream_context(stream: Any = None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext(stream)


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def host_cuda() -> types.ModuleType:
    """Build the stand-in for ``torch.cuda``; unknown names fall through to the real one."""
    view = types.ModuleType("torch.cuda")
    view.__dict__.update(torch.cuda.__dict__)
    random_view = types.SimpleNamespace(
        get_rng_state=_get_rng_state, set_rng_state=_set_rng_state, manual_seed=_manual_seed
    )
    view.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_device=lambda: HOST,
        device_count=lambda: 1,
        set_device=_nothing,
        device=_stream_context,
        get_device_name=lambda device=None: "CPU",
        get_device_capability=lambda device=None: CAPABILITY,
        get_device_properties=lambda device=None: types.SimpleNamespace(
            name="CPU",
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            multi_processor_count=1,
            total_memory=0,
        ),
        Stream=HostStream,
        ExternalStream=HostStream,
        Event=HostEvent,
        stream=_stream_context,
        current_stream=lambda device=None: HostStream(),
        default_stream=lambda device=None: HostStream(),
        set_stream=_nothing,
        synchronize=_nothing,
        is_current_stream_capturing=lambda: False,
        empty_cache=_nothing,
        reset_peak_memory_stats=_nothing,
        memory_stats=_memory_stats,
        memory_allocated=_resident_bytes,
        memory_reserved=_resident_bytes,
        max_memory_allocated=_peak_bytes,
        max_memory_reserved=_peak_bytes,
        device_memory_used=_resident_bytes,
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        manual_seed=_manual_seed,
        manual_seed_all=_manual_seed,
        random=random_view,
        default_generators=(torch.default_generator,),
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_stream_context),
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
    )
    return view
