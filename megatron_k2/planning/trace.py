"""A model's step by shapes alone: memory, products and messages, without a number computed.

``ShapeTrace`` runs the real modules, forward and backward, with floating-point tensors on the meta
device; integers and masks keep their values, so that counts and splits of tokens are real. What
depends on numbers that nobody has is assumed: a router spreads its tokens evenly (top-k takes
experts in turn), no comparison holds, and other ranks of a gather are like this one. Storages are
counted while they live, as an allocator would without rounding. The modules traced are those built:
a Transformer Engine kernel saves what it likes. Collectives need ``enter_fake_world``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from megatron_k2.device import in_host_memory
from megatron_k2.planning.wire import WireLog

UNKNOWN = 1.0
"""What is read where a module asks for a number that nobody has: a norm, a loss."""

META, HOST = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten


_TYPE_NAMES = {
    dtype: torch.empty(0, dtype=dtype).type()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


class _HostNames(TorchFunctionMode):
    """What the dispatcher does not see: names of tensor types, numbers put into a new tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and args[0].is_meta:
            return _TYPE_NAMES[args[0].dtype]
        if func is torch.tensor:
            args = tree_map_only(Tensor, lambda one: UNKNOWN if one.is_meta else one, args)
        return func(*args, **(kwargs or {}))


def _tensors(*values: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dictionaries."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


class LiveStorages:
    """Bytes of the storages that a region's operations made, while they live.

    Attributes:
        peak_bytes: most that lived at once since ``reset_peak``.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._live = 0

    def live_bytes(self) -> int:
        """Return the bytes of all storages noted that still live."""
        for key, reference in list(self._references.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != self._sizes[key]:
                self._live += storage.nbytes() - self._sizes[key]  # resized in place
                self._sizes[key] = storage.nbytes()
        return self._live

    def reset_peak(self) -> None:
        """Begin a new count of ``peak_bytes``."""
        self.peak_bytes = self.live_bytes()

    def note(self, result: Any, given: Sequence[Tensor]) -> None:
        """Count the storages of an operation's results that are not those of what it was given."""
        old = {one.untyped_storage()._cdata for one in given}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self._note(storage)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._references:
            return
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = storage.nbytes()
        self._live += self._sizes[key]
        if self._live > self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)
        del self._references[key]


class ShapeTrace(WireLog):
    """Context in which modules run by shape.

    Attributes:
        messages: collectives and messages, in order.
        storages: what lives of all that was made here.
        host_storages: what lives in pinned host memory, where activations are offloaded to.
        flops: of matrix products since the beginning.
        products: (flops, bytes read and written, ``of_weights``) of every product.
        of_weights: whether what runs multiplies by weights; the caller keeps it true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.host_storages = LiveStorages(), LiveStorages()
        self.flops = 0
        self.products: list[tuple[int, int, bool]] = []
        self.of_weights = True
        self._names = _HostNames()

    def __enter__(self) -> ShapeTrace:
        self._names.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._names.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation by shape."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self.log(func, args)
            return _collective(func, args)
        given = _tensors(args, kwargs)
        result = _run(func, args, kwargs, given)
        (self.host_storages if in_host_memory.get() else self.storages).note(result, given)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            return
        flops = int(count(*args, **kwargs, out_val=result))
        moved = sum(one.numel() * one.element_size() for one in _tensors(args, result))
        self.flops += flops
        self.products.append((flops, moved, self.of_weights))


def _run(func: Any, args: Any, kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
    """Compute integers, shape floating-point tensors."""
    if not any(one.is_meta for one in tensors):
        return _run_on_host(func, args, kwargs, made=not tensors)
    if func in _IN_PLACE and args[0].is_meta:
        return args[0]
    if func is aten.topk.default:
        return _even_top_k(args[0], args[1])
    if func is aten._local_scalar_dense.default:
        return UNKNOWN
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": META}
    if not all(one.is_meta for one in tensors):
        args, kwargs = tree_map_only(Tensor, _shape_of, (args, kwargs))
    if not _makes_new(func):
        return _map(_known, func(*args, **kwargs))
    key = (func, _described(args), _described(kwargs))
    made = _MADE.get(key)
    if made is None:
        result = _map(_known, func(*args, **kwargs))
        if isinstance(result, Tensor) and result.is_meta:
            _MADE[key] = (result.shape, result.stride(), result.dtype)
        return result
    return torch.empty_strided(made[0], made[1], dtype=made[2], device=META)


_MADE: dict[Any, tuple[Any, Any, torch.dtype]] = {}
"""What an operation made of such arguments before: torch's own shape functions are slow."""

_IN_PLACE = {
    aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar,
    aten.copy_.default, aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor,
    aten.addcmul_.default, aten.lerp_.Scalar,
}  # fmt: skip
"""Change numbers alone."""


@cache
def _makes_new(func: Any) -> bool:
    """Return whether an operation makes new memory, of a shape that follows from its arguments."""
    if func.namespace != "aten" or func is aten._unsafe_view.default:
        return False
    named = (*func._schema.arguments, *func._schema.returns)
    return not any(one.alias_info for one in named)


def _described(value: Any) -> Any:
    """Return what a result's shape can depend on, hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_described(one) for one in value)
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value


def _map(function: Any, result: Any) -> Any:
    return (
        function(result) if isinstance(result, Tensor) else tree_map_only(Tensor, function, result)
    )


def _run_on_host(func: Any, args: Any, kwargs: dict[str, Any], *, made: bool) -> Any:
    """Run an operation on integers, or one that makes a tensor of nothing."""
    takes_device = any(one.name == "device" for one in func._schema.arguments)
    if not takes_device or (not made and kwargs.get("device") is None):
        return _map(_shaped, func(*args, **kwargs))
    # Made on the meta device first: a large floating-point tensor never exists.
    shape = tree_map_only(Tensor, _shape_of, (args, {**kwargs, "device": META}))
    result = func(*shape[0], **shape[1])
    is_float = isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())
    return result if is_float else func(*args, **{**kwargs, "device": HOST})


def _shape_of(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _shaped(tensor: Tensor) -> Tensor:
    return _shape_of(tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor


def _known(tensor: Tensor) -> Tensor:
    """Give integers and masks that follow from floating-point numbers a value: zero, False."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _even_top_k(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return top-k whose indices take all choices in turn."""
    shape = (*scores.shape[:-1], count)
    turns = torch.arange(torch.Size(shape).numel()) % scores.shape[-1]
    return torch.empty(shape, dtype=scores.dtype, device=META), turns.view(shape)


def _collective(func: Any, args: Any) -> Any:
    """Return what a c10d call returns; integers arrive as if all ranks were like this one."""
    name = func._schema.name.removeprefix("c10d::")
    if name in ("_allgather_base_", "alltoall_base_") and not args[0].is_meta:
        args[0].copy_(args[1].repeat(-(-args[0].shape[0] // max(args[1].shape[0], 1)), *[1] * (
            args[1].dim() - 1))[: args[0].shape[0]])  # fmt: skip
    elif name == "allgather_":
        for outputs, given in zip(args[0], args[1], strict=True):
            for output in outputs:
                output.copy_(given)
    work = torch._C._distributed_c10d.FakeWork().boxed()
    returns = func._schema.returns
    return work if len(returns) == 1 else (args[0], work)
