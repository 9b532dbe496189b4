"""Configuration of a K2 transformer: upstream's MLA configuration plus the fields K2 needs.

Every upstream field keeps its name and meaning (``megatron.core.transformer``).
The fields below are filled from flags of the same destination (``--k2-router-bias-rule`` and so
on), because ``core_transformer_config_from_args`` copies arguments by field name. Sources: Kimi K2
report, arXiv 2507.20534; Moonlight report, arXiv 2502.16982.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import MLATransformerConfig

ROUTER_BIAS_RULES = ("sign", "mean_centred")


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

    def __post_init__(self) -> None:
        """Check the K2 fields, then upstream's."""
        if self.k2_router_bias_rule not in ROUTER_BIAS_RULES:
            raise ValueError(
                f"--k2-router-bias-rule {self.k2_router_bias_rule!r} is not one of "
                f"{', '.join(ROUTER_BIAS_RULES)}"
            )
        super().__post_init__()
        if self.k2_max_attention_logit and not self.k2_te_max_attention_logit:
            # The training loop logs ours; this field would ask Transformer Engine for its own.
            self.log_max_attention_logit = False
