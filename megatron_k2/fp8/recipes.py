"""``--k2-fp8-scope`` with Transformer Engine: which of its modules run in FP8.

Megatron's ``--fp8-format`` makes every Transformer Engine linear of a layer quantise. Its hook for
single modules (``TransformerConfig.quant_recipe``) can send some back to bf16, and that is all that
happens here: modules outside the scope ``experts`` answer with ``BF16``, those inside with None, so
that they keep the layer's own recipe: delayed, tensorwise, blockwise or mxfp8,
``--fp8-param-gather`` included. ``linear`` is Megatron's own meaning, DeepSeek-V3's (arXiv
2412.19437, section 3.3) and the set of tensors that K2's release holds in FP8; ``all`` is
the field ``fp8_dot_product_attention``.

Kimi K2 itself was trained in bf16 products (arXiv 2507.20534, section 2.4.3). Modules were built on
the meta device under every recipe; nothing was run on a GPU.
"""

from __future__ import annotations

from typing import Any

from megatron.core.quantization.quant_config import MatchContext, Matcher, RecipeConfig

from megatron_k2.fp8.scope import SCOPES, is_in_scope

# Without a quantisation recipe of its own a module computes, and holds its weights, in bf16
# (megatron-core 0.19.2, extensions/transformer_engine.py: TEQuantizationRecipe).
BF16 = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
# The widest heads that cuDNN's FP8 attention trains, on Blackwell from 9.21 on: DeepSeek-V3's and
# K2's (TransformerEngine, common/fused_attn/fused_attn.cpp). On Hopper 192 and 128 have no kernel.
MAX_FP8_HEAD_DIM, MAX_FP8_V_HEAD_DIM, FP8_HEAD_DIM_STEP = 192, 128, 16


class _OutsideExperts(Matcher):
    """Answers with bf16 for every module that is not an expert's."""

    def match(self, context: MatchContext) -> str | None:
        return None if is_in_scope(context.module_path, "experts") else "bf16"


def scope_recipe(scope: str) -> RecipeConfig | None:
    """Return what ``TransformerConfig.quant_recipe`` must be for a scope.

    Args:
        scope: one of ``SCOPES``.

    Returns:
        None for ``linear`` and ``all``, which need no exception.

    Raises:
        ValueError: the scope is unknown.
    """
    if scope not in SCOPES:
        raise ValueError(f"--k2-fp8-scope {scope!r} is not one of {', '.join(SCOPES)}")
    return RecipeConfig([_OutsideExperts()], {"bf16": BF16}) if scope == "experts" else None


def check_scope(config: Any) -> None:
    """Check that a configuration's FP8 attention is what its scope says, and can exist.

    Args:
        config: a ``K2TransformerConfig`` whose ``fp8`` is set, with Transformer Engine.

    Raises:
        ValueError: the attention's products are in FP8 outside the scope ``all``, or no kernel of
            Transformer Engine does what ``all`` asks for.
    """
    scope = config.k2_fp8_scope
    if scope != "all":
        if config.fp8_dot_product_attention or config.fp8_multi_head_attention:
            raise ValueError(
                f"--k2-fp8-scope {scope} keeps the attention's products in bf16; with "
                "fp8_dot_product_attention or fp8_multi_head_attention it must be all"
            )
        return
    if config.fp8_recipe == "blockwise":
        raise ValueError(
            "--k2-fp8-scope all: Transformer Engine has no attention in --fp8-recipe blockwise; "
            "take delayed, tensorwise or mxfp8, or --k2-fp8-scope linear"
        )
    if config.qk_clip or config.log_max_attention_logit:
        raise ValueError(
            "--k2-fp8-scope all: Transformer Engine's FP8 attention does not return the largest "
            "logit; leave out --log-max-attention-logit and --qk-clip"
        )
    _check_heads(config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim)


def _check_heads(qk: int, v: int) -> None:
    """Raise ValueError for heads that no FP8 attention kernel takes."""
    is_small = qk <= MAX_FP8_HEAD_DIM and v <= MAX_FP8_V_HEAD_DIM
    if not is_small or qk % FP8_HEAD_DIM_STEP or v % FP8_HEAD_DIM_STEP:
        raise ValueError(
            f"--k2-fp8-scope all: heads of {qk} (query, key) and {v} (value) numbers; attention in "
            f"FP8 takes multiples of {FP8_HEAD_DIM_STEP} up to {MAX_FP8_HEAD_DIM} and "
            f"{MAX_FP8_V_HEAD_DIM}: --qk-head-dim + --qk-pos-emb-head-dim, --v-head-dim"
        )
