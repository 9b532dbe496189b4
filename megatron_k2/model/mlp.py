"""Dense and shared-expert MLPs on the local path, with the one-pass SwiGLU of ``swiglu.py``.

``--recompute-modules moe_act`` discards SwiGLU's output here too, as Kimi K2 does (report, section
2.4.3); upstream's knows routed experts only. Everything else is upstream's. Configurations with a
bias, a clamp, another activation or a per-token scale take upstream's forward.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_k2.fp8.activation_store import kept_in_fp8
from megatron_k2.model.swiglu import swiglu


class K2MLP(MLP):
    """MLP whose SwiGLU is one pass and saves only its input."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the MLP's output and bias, see ``MLP.forward``.

        Args:
            hidden_states: [sequence, batch, hidden], sharded as upstream's MLP.
            per_token_scale: None, or a weight a token (then upstream's forward runs).
        """
        config = self.config
        if (
            per_token_scale is not None
            or config.add_bias_linear
            or config.activation_func is not F.silu
            or not config.gated_linear_unit
            or config.activation_func_clamp_value is not None
            or config.glu_linear_offset != 0
            or config.use_te_activation_func
        ):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        intermediate, _ = self.linear_fc1(hidden_states)
        in_fp8 = "swiglu_input" in (getattr(config, "k2_fp8_activations", None) or ())
        if not (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        ):
            return self.linear_fc2(swiglu(intermediate, in_fp8))
        checkpoint = CheckpointWithoutOutput()
        with kept_in_fp8(lambda tensor: True, True) if in_fp8 else nullcontext():
            activated = checkpoint.checkpoint(swiglu, intermediate)
        output, bias = self.linear_fc2(activated)
        checkpoint.discard_output_and_register_recompute(output)
        return output, bias


class K2SharedExpertMLP(SharedExpertMLP, K2MLP):
    """SharedExpertMLP on ``K2MLP``: upstream's calls ``super().forward``, which is K2MLP's."""
