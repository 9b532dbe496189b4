"""Kimi K2's FP8 storage of two activations under Transformer Engine's modules.

``--k2-fp8-activations`` (report, arXiv 2507.20534 section 2.4.3) packs what autograd saves of the
input of the routed experts' first linear and of SwiGLU's input. Upstream's forward passes run
unchanged under saved-tensor hooks that know the two tensors by their storage: a ``GroupedLinear``
in bf16 saves a view an expert; ``weighted_bias_swiglu_impl``, or the checkpoint of
``--recompute-modules moe_act``, saves its input whole. A first linear that runs in FP8 has saved
its input in FP8 already and is left alone. Only one context of hooks is in force at a time, so that
what brings its own for the same tensors is refused.

Tested on the CPU with upstream's forward passes over linears that save as Transformer Engine's do;
never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_k2.fp8.activation_store import check_names, kept_in_fp8

_OFFLOADED = {"moe_up_proj_input": "expert_fc1", "swiglu_input": "moe_act"}
"""What ``--offload-modules`` calls the module that saves an activation."""


class KeepsInFP8:
    """What is added to upstream's MLP classes; mixed in before them."""

    is_routed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build upstream's module.

        Raises:
            ValueError: another setting keeps, moves or fuses away the same tensors.
        """
        super().__init__(*args, **kwargs)
        config, linear = self.config, self.linear_fc1  # type: ignore[attr-defined]
        names = check_names(config.k2_fp8_activations or ())
        _refuse_other_keepers(config, names)
        self._held: list[Tensor] = []
        self._recomputes = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        if self.is_routed and "moe_up_proj_input" in names:
            linear.register_forward_pre_hook(lambda _, args: self._held.append(args[0]))
        if "swiglu_input" in names:
            linear.register_forward_hook(lambda _, args, output: self._held.append(output[0]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as upstream does; arguments and result as there."""
        return self._packing(super().forward, *args, **kwargs)  # type: ignore[misc]

    def _packing(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function under the hooks; the held tensors live on so that no storage returns."""
        try:
            with kept_in_fp8(self._is_wanted, self._recomputes):
                return function(*args, **kwargs)
        finally:
            self._held.clear()

    def _is_wanted(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or not tensor.numel():
            return False
        at = tensor.untyped_storage().data_ptr()
        return any(
            tensor.dtype == held.dtype and at == held.untyped_storage().data_ptr()
            for held in self._held
        )


class K2TEGroupedMLP(KeepsInFP8, TEGroupedMLP):  # type: ignore[misc]
    """Routed experts."""

    is_routed = True


class K2TEMLP(KeepsInFP8, MLP):  # type: ignore[misc]
    """A dense layer's MLP."""


class K2TESharedExpertMLP(KeepsInFP8, SharedExpertMLP):  # type: ignore[misc]
    """The shared expert."""

    def linear_fc1_forward_and_act(self, *args: Any, **kwargs: Any) -> None:
        """Do the first half, beside the dispatcher (``--moe-shared-expert-overlap``)."""
        self._packing(super().linear_fc1_forward_and_act, *args, **kwargs)


def _refuse_other_keepers(config: Any, names: frozenset[str]) -> None:
    """Raise ValueError where the hooks would not see, or would hide, what is saved."""
    others = {
        "--use-transformer-engine-op-fuser": config.use_transformer_engine_op_fuser,
        "--use-grouped-gemm-for-shared-expert": config.use_grouped_gemm_for_shared_expert,
        "--cpu-offloading-num-layers": config.cpu_offloading,
        "activation_func_fp8_input_store": config.activation_func_fp8_input_store,
    }
    if config.fine_grained_activation_offloading:
        for name in names:
            module = _OFFLOADED[name]
            others[f"--offload-modules {module}"] = module in config.offload_modules
    if "swiglu_input" in names:  # only the fused function saves its input and nothing else
        others["--no-bias-swiglu-fusion"] = not config.bias_activation_fusion
        others["--use-te-activation-func"] = config.use_te_activation_func
        others["--moe-mlp-glu-interleave-size"] = config.moe_mlp_glu_interleave_size is not None
    for flag, is_on in others.items():
        if is_on and names:
            raise ValueError(
                f"--k2-fp8-activations {' '.join(sorted(names))} and {flag} both say how an MLP "
                "keeps its activations; leave one out"
            )
