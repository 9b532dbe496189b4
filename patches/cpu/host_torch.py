"""The name ``torch`` inside Megatron's modules, seen from the host.

Instead of changing torch for the whole process, this patch gives every ``megatron.*`` module its
own view of it: ``torch.cuda`` is the host's (``host_cuda.py``), a factory or ``torch.device`` asked
for ``cuda`` answers with the CPU, ``init_process_group`` drops ``device_id``, ``all_to_all_single``
turns its split sizes into the Python ints gloo insists on, and AdamW is the fused one. Modules
imported later get the view too, through one import hook. Functions that upstream compiled at import
(``jit_fuser`` is ``torch.compile``) run as written: no compiler is needed on the host, and its
start-up is longer than a short run.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_k2.patches.cpu.host_collectives import all_gather, reduce_scatter
from megatron_k2.patches.cpu.host_cuda import HOST, host_cuda
from megatron_k2.patches.patch import Patch

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory: ``device="cuda"`` becomes the CPU, pinned memory ordinary memory."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = HOST
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


class _HostDeviceType(type):
    """Makes the stand-in for ``torch.device`` pass ``isinstance`` like the original."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.device)

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        if (args and _is_cuda(args[0])) or _is_cuda(kwargs.get("type", "")):
            return HOST
        return torch.device(*args, **kwargs)


class _HostDevice(metaclass=_HostDeviceType):
    """``torch.device`` without CUDA."""


def _host_distributed() -> types.ModuleType:
    view = types.ModuleType("torch.distributed")
    view.__dict__.update(torch.distributed.__dict__)

    def init_process_group(*args: Any, device_id: Any = None, **kwargs: Any) -> None:
        """Initialise without binding the group to a CUDA device."""
        torch.distributed.init_process_group(*args, **kwargs)

    def all_to_all_single(
        output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Exchange with split sizes as Python ints, which gloo insists on."""
        for name in ("output_split_sizes", "input_split_sizes"):
            if kwargs.get(name) is not None:
                kwargs[name] = [int(size) for size in kwargs[name]]
        return torch.distributed.all_to_all_single(output, input, *args, **kwargs)

    def __getattr__(name: str) -> Any:
        return getattr(torch.distributed, name)

    view.__dict__.update(
        init_process_group=init_process_group,
        all_to_all_single=all_to_all_single,
        all_gather=all_gather,
        reduce_scatter=reduce_scatter,
        __getattr__=__getattr__,
    )
    return view


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one pass over its tensors; the plain one makes some ten on the host."""

    def __init__(self, params: Any, *, capturable: bool = False, **kwargs: Any) -> None:
        super().__init__(params, fused=True, **kwargs)


def _host_optim() -> types.ModuleType:
    view = types.ModuleType("torch.optim")
    view.__dict__.update(torch.optim.__dict__)
    view.__dict__.update(AdamW=FusedAdamW)
    return view


@functools.cache
def host_torch() -> types.ModuleType:
    """Return the one view of torch that all Megatron modules share."""
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    view.__dict__.update({name: _on_host(getattr(torch, name)) for name in _FACTORIES})
    view.__dict__.update(
        cuda=host_cuda(),
        device=_HostDevice,
        distributed=_host_distributed(),
        optim=_host_optim(),
        __getattr__=lambda name: getattr(torch, name),
    )
    return view


def _uncompiled(value: Any) -> Any:
    """Return the function that ``torch.compile`` wrapped at import, or the value itself."""
    return getattr(value, "_torchdynamo_orig_callable", value) if callable(value) else value


class HostView(importlib.abc.MetaPathFinder):
    """Gives ``torch`` in ``megatron.*`` modules the host's meaning, now and at later imports."""

    def __init__(self) -> None:
        self._changed: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Retarget the loaded modules and hook the import of the others."""
        for name, module in list(sys.modules.items()):
            if self._is_ours(name) and module is not None:
                self.retarget(module)
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Undo every change, last first."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for owner, name, original in reversed(self._changed):
            setattr(owner, name, original)
        self._changed.clear()

    def retarget(self, module: types.ModuleType) -> None:
        """Point one module's ``torch`` at the host's view and take its compiled functions apart."""
        for name, value in list(vars(module).items()):
            if value is torch:
                self._set(module, name, host_torch())
            elif inspect.isclass(value) and value.__module__ == module.__name__:
                for attribute, member in list(vars(value).items()):
                    if _uncompiled(member) is not member:
                        self._set(value, attribute, _uncompiled(member))
            elif _uncompiled(value) is not value:
                self._set(module, name, _uncompiled(value))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    @staticmethod
    def _is_ours(name: str) -> bool:
        return name.startswith("megatron.")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a Megatron module as usual, and retarget it after its code has run."""
        if not self._is_ours(fullname):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    self._hook(spec.loader)
                return spec
        return None

    def _hook(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self.retarget(module)

        loader.exec_module = exec_module


class ViewPatch(Patch):
    """A patch of one name in many modules; apply and revert go through the view."""

    @property
    def is_applied(self) -> bool:
        """Whether the view is installed."""
        return _VIEW in sys.meta_path

    def apply(self) -> None:
        """Install the view; a second call does nothing."""
        if not self.is_applied:
            self._check_version()
            _VIEW.install()

    def revert(self) -> None:
        """Take the view away."""
        if self.is_applied:
            _VIEW.uninstall()


def _still_needed() -> bool:
    """Upstream's training start-up still refuses a machine without CUDA."""
    from megatron.training import initialize

    return "Megatron requires CUDA" in inspect.getsource(initialize.initialize_megatron)


_VIEW = HostView()

PATCH = ViewPatch(
    id="host-torch",
    target="megatron.core.utils:torch",
    replacement=lambda original: host_torch(),
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="builtin",
    why="some 450 calls of torch.cuda and device='cuda' in Megatron fail on a host without a GPU",
    upstream="megatron/training/initialize.py: 'Megatron requires CUDA.'",
    remove_when="Megatron-Core takes its device from a setting instead of naming CUDA",
    still_needed=_still_needed,
    group="cpu",
)
