"""Configuration of a K2 transformer: upstream's MLA configuration plus the fields K2 needs.

Every upstream field keeps its name and meaning (``megatron.core.transformer``).
The fields below are filled from flags of the same destination (``--k2-router-bias-rule`` and so
on), because ``core_transformer_config_from_args`` copies arguments by field name. Sources: Kimi K2
report, arXiv 2507.20534; Moonlight report, arXiv 2502.16982.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_k2.adapters import check_adapters, expand_targets, layers_present
from megatron_k2.fp8.activation_store import check_names
from megatron_k2.fp8.recipes import check_scope, scope_recipe
from megatron_k2.fp8.scope import SCOPES, check_emulated

ROUTER_BIAS_RULES = ("sign", "mean_centred")
CONTEXT_EXCHANGES = ("latent", "expanded")
MOE_DOWN_PROJ = "moe_down_proj"
"""One of ``--recompute-modules``, of the report beside Megatron's own; see ``_take_down_proj_``."""


@dataclass
class K2TransformerConfig(MLATransformerConfig):
    """An MLA transformer configuration with K2's own choices.

    Raises:
        ValueError: a K2 field holds a value outside its set.
    """

    k2_router_bias_rule: str = "sign"
    """How the router's expert bias moves: ``sign`` adds ``u * sign(e_i)`` (DeepSeek-V3, Megatron),
    ``mean_centred`` subtracts the signs' mean, so that the biases keep their sum (Moonlight)."""

    k2_max_attention_logit: bool = True
    """Record each head's exact maximum softmax input in training forwards (QK-Clip needs it)."""

    k2_te_max_attention_logit: bool = False
    """Take Transformer Engine's own maximum instead: rounded to bf16, FlashAttention off."""

    k2_context_exchange: str = "latent"
    """What context-parallel ranks exchange: the ``latent`` (latent_context.py), or ``expanded``
    keys and values as Transformer Engine does it by ``cp_comm_type``."""

    k2_fp8_activations: list[str] | None = None
    """Activations that are kept for the backward pass in FP8, of ``activation_store.ACTIVATIONS``
    (Kimi K2 report, section 2.4.3: both); None keeps all as they are."""

    k2_fp8_scope: str = "experts"
    """Which products run in FP8 under ``fp8``: experts, linear or all (fp8/scope.py)."""

    k2_fp8_blockwise: bool = False
    """Without Transformer Engine: compute them in blockwise FP8 (fp8/operands.py). Set from ``fp8``
    and ``fp8_recipe``, which upstream's modules must not see where there is no FP8 of theirs."""

    k2_lora_rank: int = 0
    """Rank of low-rank adapters over a frozen base (lora.py); 0 for none."""

    k2_lora_alpha: float | None = None
    """Their output is multiplied by this over the rank; None for the rank."""

    k2_lora_targets: list[str] | None = None
    """Linear layers that have one, as ``adapters.expand_targets`` reads them; None for all."""

    k2_lora_seed: int = 1234
    """Of the adapters' start, which depends on nothing else but a weight's place in the model."""

    def __post_init__(self) -> None:
        """Check the K2 fields, then upstream's."""
        check_adapters(self)
        if self.k2_lora_rank:
            self.k2_lora_targets = list(expand_targets(self.k2_lora_targets))
        if self.k2_fp8_scope not in SCOPES:
            raise ValueError(f"--k2-fp8-scope {self.k2_fp8_scope!r} is not one of {SCOPES}")
        if self.transformer_impl == "local":
            self._take_fp8_()
        self._take_down_proj_()
        check_names(self.k2_fp8_activations or ())
        if self.k2_router_bias_rule not in ROUTER_BIAS_RULES:
            raise ValueError(
                f"--k2-router-bias-rule {self.k2_router_bias_rule!r} is not one of "
                f"{', '.join(ROUTER_BIAS_RULES)}"
            )
        if self.k2_context_exchange not in CONTEXT_EXCHANGES:
            raise ValueError(
                f"--k2-context-exchange {self.k2_context_exchange!r} is not one of "
                f"{', '.join(CONTEXT_EXCHANGES)}"
            )
        super().__post_init__()
        if self.k2_lora_rank and not layers_present(self) & set(self.k2_lora_targets or ()):
            raise ValueError(
                f"--k2-lora-targets {' '.join(self.k2_lora_targets or ())}: the model has none of "
                "these layers"
            )
        if self.k2_max_attention_logit and not self.k2_te_max_attention_logit:
            # The training loop logs ours; this field would ask Transformer Engine for its own.
            self.log_max_attention_logit = False
        if self.transformer_impl == "transformer_engine" and self.fp8:
            self._take_scope_()

    def _take_scope_(self) -> None:
        """Tell Transformer Engine's modules, and its attention, what the scope is.

        Raises:
            ValueError: the scope cannot hold (``recipes.check_scope``).
        """
        upstream: Any = self
        upstream.fp8_dot_product_attention |= self.k2_fp8_scope == "all"
        check_scope(self)
        if upstream.quant_recipe is None:
            upstream.quant_recipe = scope_recipe(self.k2_fp8_scope)

    def _take_fp8_(self) -> None:
        """Move upstream's FP8 fields to ours, for layers without Transformer Engine.

        Raises:
            ValueError: the recipe, format or scope has no emulation.
        """
        upstream: Any = self
        if not upstream.fp8:
            return
        is_special = upstream.fp8_param or not upstream.fp8_wgrad
        check_emulated(upstream.fp8, upstream.fp8_recipe, self.k2_fp8_scope, is_special)
        upstream.fp8, self.k2_fp8_blockwise = None, True

    def _take_down_proj_(self) -> None:
        """Turn ``moe_down_proj`` among the modules to recompute into what it takes here.

        Routing probabilities are applied before the down-projection, so that its output is kept by
        nobody: their gradient is <dy W2, h>, not <dy, W2 h>. What is left of it is its input, which
        is the output of the activation: ``moe_act``.
        """
        upstream: Any = self
        modules = upstream.recompute_modules
        if modules is not None and MOE_DOWN_PROJ in modules:
            others = [name for name in modules if name not in (MOE_DOWN_PROJ, "moe_act")]
            upstream.recompute_modules = [*others, "moe_act"]


_RENAMED = {"num_experts": "num_moe_experts", "swiglu": "gated_linear_unit"}


def config_from_arguments(arguments: Mapping[str, Any], **overrides: Any) -> K2TransformerConfig:
    """Return the configuration that upstream would copy from these arguments, for the CPU.

    Args:
        arguments: Megatron's destinations to values; those that are no field are passed over.
        overrides: fields; they win.
    """
    known = set(K2TransformerConfig.__dataclass_fields__)
    values = {_RENAMED.get(dest, dest): value for dest, value in arguments.items()}
    values = {name: value for name, value in values.items() if name in known}
    pattern = values.get("moe_layer_freq", 1)
    values["moe_layer_freq"] = _layer_pattern(pattern) if isinstance(pattern, str) else pattern
    values.update(
        activation_func=torch.nn.functional.silu,
        # What --bias-swiglu-fusion is by default on a GPU; the host has no such kernel.
        bias_activation_fusion=overrides.get("transformer_impl") == "transformer_engine",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        transformer_impl="local",
        use_cpu_initialization=True,
        deallocate_pipeline_outputs=True,
    )
    return K2TransformerConfig(**{**values, **overrides})


def _layer_pattern(text: str) -> list[int]:
    """Return the list that a sum of products such as ``([0]*1+[1]*60)`` stands for."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        assert isinstance(node, ast.BinOp), text
        left, right = value(node.left), value(node.right)
        return left * right if isinstance(node.op, ast.Mult) else left + right

    found: list[int] = value(ast.parse(text, mode="eval").body)
    return found
