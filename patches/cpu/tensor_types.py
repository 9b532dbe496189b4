"""Optimizers that recognise a parameter by ``torch.cuda.FloatTensor`` and its kin.

Three constructors and the gradient clip compare ``tensor.type()`` with CUDA type names. The patch
gives each function the same code with those names replaced by the host's; nothing else changes.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch

_NAMES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def with_constants(function: Any, names: dict[str, str]) -> types.FunctionType:
    """Return a copy of ``function`` whose string constants are replaced as ``names`` says."""

    def swap(constant: Any) -> Any:
        if isinstance(constant, str):
            return names.get(constant, constant)
        if isinstance(constant, tuple):
            return tuple(swap(item) for item in constant)
        return constant

    code = function.__code__
    copy = types.FunctionType(
        code.replace(co_consts=tuple(swap(constant) for constant in code.co_consts)),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _replacement(original: Any) -> Any:
    if isinstance(original, types.MethodType):
        return classmethod(with_constants(original.__func__, _NAMES))
    return with_constants(original, _NAMES)


def _names_cuda(target: Callable[[], Any]) -> Callable[[], bool]:
    def still_needed() -> bool:
        original = target()
        code = getattr(original, "__func__", original).__code__
        return "torch.cuda." in repr(code.co_consts)

    return still_needed


def _patch(name: str, target: str, fingerprint: str, importers: tuple[str, ...] = ()) -> Patch:
    patch = Patch(
        id=f"tensor-types-{name}",
        target=target,
        replacement=_replacement,
        distribution="megatron-core",
        min_version="0.19.0",
        max_version="0.19.2",
        fingerprint=fingerprint,
        why="parameters and gradients on the host are refused: their type name is not CUDA's",
        upstream=target.replace(":", " "),
        remove_when="upstream compares dtypes instead of type names",
        still_needed=_names_cuda(lambda: patch.original()),
        group="cpu",
        importers=importers,
    )
    return patch


PATCHES = (
    _patch(
        "zero1-init",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        "27507ad691f2",
    ),
    _patch(
        "zero1-groups",
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer._build_model_and_main_param_groups",
        "3fce9be2b6d1",
    ),
    _patch(
        "float16-init",
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        "de5b68240922",
    ),
    _patch(
        "clip-grad",
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        "cf07b488fb76",
        importers=("megatron.core.optimizer.optimizer", "megatron.core.optimizer"),
    ),
)
