"""Routed experts without Transformer Engine: upstream's grouped MLP on our grouped GEMM.

``K2GroupedMLP`` is a ``TEGroupedMLP`` whose two layers are ``K2GroupedLinear``; construction, state
dict and ``backward_dw`` are upstream's, the forward is ``grouped_mlp.py``. What it would compute
wrongly is refused: activations other than SwiGLU, FP4, latent MoE, probabilities on the input.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface as off_interface,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_k2.fp8.operands import PLAIN, Operands
from megatron_k2.model.grouped_gemm import RowPlan, plan_rows
from megatron_k2.model.grouped_linear import K2ColumnGroupedLinear, K2RowGroupedLinear
from megatron_k2.model.grouped_mlp import grouped_swiglu_mlp
from megatron_k2.model.permutation import TokenPermutation


class K2GroupedMLP(TEGroupedMLP):
    """The local routed experts as one autograd function (``grouped_mlp.py``).

    Attributes:
        operands: how the products see theirs; the layer sets it (``local_linear.py``).
        fc1_class, fc2_class: of the two layers.
    """

    operands: Operands = PLAIN
    fc1_class: type = K2ColumnGroupedLinear
    fc2_class: type = K2RowGroupedLinear

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        """Build the two layers; arguments as upstream's experts.

        Raises:
            ValueError: the configuration asks for what this implementation does not compute.
        """
        _check_supported(config)
        submodules = GroupedMLPSubmodules(
            linear_fc1=self.fc1_class,
            linear_fc2=self.fc2_class,
        )
        super().__init__(num_local_experts, config, submodules, pg_collection, name)

    def forward(  # type: ignore[override]
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        permutation: TokenPermutation | None = None,
    ) -> tuple[Tensor, None]:
        """Return each row's expert output times its probability.

        Args:
            permuted_local_hidden_states: [rows, hidden], sorted by local expert.
            tokens_per_expert: [local experts] integers; experts may be empty.
            permuted_probs: [rows] routing probabilities.
            permutation: if given, the states are [tokens, hidden] in token order and so is the
                result, summed over each token's experts.

        Returns:
            [rows, hidden] (a partial sum over expert tensor parallelism), and no bias.
        """
        plan = plan_rows(
            tokens_per_expert.tolist(), permuted_local_hidden_states, permutation,
            batched=self.operands.is_fp8,
        )  # fmt: skip
        offloading = self._offloading(permuted_local_hidden_states)
        with offloading as x:
            output = self._mlp(x, permuted_probs, plan)
        return offloading.group_offload(output), None

    def _mlp(self, x: Tensor, probs: Tensor, plan: RowPlan) -> Tensor:
        """Return every row's output, see ``grouped_swiglu_mlp``."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        is_delayed = self.config.delay_wgrad_compute and fc1.weight.requires_grad
        queues = (fc1.pending, fc2.pending) if is_delayed and fc2.weight.requires_grad else None
        return grouped_swiglu_mlp(
            x, probs, fc1.weight, fc2.weight, plan, queues, self._in_fp8, self.operands, self._stay
        )

    @property
    def _in_fp8(self) -> frozenset[str]:
        """What the function keeps in FP8 for the backward pass."""
        return frozenset(getattr(self.config, "k2_fp8_activations", None) or ())

    def _offloading(self, x: Tensor) -> off_interface:
        """Return the context in which what the function saves is offloaded, as one group.

        Upstream makes two groups, around fc1 and around the activation, which are one function
        here; the group has the name of the first that is asked for.
        """
        name = "expert_fc1" if self.offload_expert_fc1 else "moe_act"
        return off_interface(self.offload_expert_fc1 or self.offload_moe_act, x, name)

    @property
    def _stay(self) -> frozenset[str]:
        """What the function saves that is not asked to be offloaded."""
        asked = {
            "moe_up_proj_input": self.offload_expert_fc1,
            "swiglu_input": self.offload_moe_act,
        }
        return frozenset(name for name, is_asked in asked.items() if not is_asked)


def _check_supported(config: TransformerConfig) -> None:
    """Raise ValueError for configurations that ``K2GroupedMLP`` would compute wrongly."""
    refused = {
        "an activation other than SwiGLU (--swiglu)": not (
            config.gated_linear_unit and config.activation_func is F.silu
        ),
        "--fp4-format": bool(config.fp4),
        "--moe-apply-probs-on-input": config.moe_apply_probs_on_input,
        "--moe-latent-size": config.moe_latent_size is not None,
        "activation_func_clamp_value": config.activation_func_clamp_value is not None,
        "glu_linear_offset": config.glu_linear_offset != 0,
        "--moe-mlp-glu-interleave-size": config.moe_mlp_glu_interleave_size is not None,
        "gradient accumulation fusion (give --no-gradient-accumulation-fusion)": (
            config.gradient_accumulation_fusion
        ),
        "--use-transformer-engine-op-fuser": config.use_transformer_engine_op_fuser,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"experts without Transformer Engine do not support {what}")
