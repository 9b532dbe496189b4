"""Numbers of a config.json that no model can have, refused before anything is planned with them.

What decides a tensor's shape is checked where the shape is made (model.py); here is what changes
only the function: a model with such a number would be converted, and fail or be wrong in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_k2.checkpoint.errors import refuse
from megatron_k2.checkpoint.hf.model import ModelShape


def require_possible(
    config: Mapping[str, Any], yarn: Mapping[str, Any] | None, shape: ModelShape
) -> None:
    """Refuse impossible numbers, all at once.

    Args:
        config: the text model's, defaults laid under it; what Megatron takes of it are numbers.
        yarn: its ``rope_scaling``, of numbers; None without one.
        shape: of the same file.

    Raises:
        ConversionRefused: a number is outside what is possible.
    """
    problems: list[str] = []

    def require(fields: Mapping[str, Any], name: str, most: float = math.inf) -> int:
        """Return a whole number from 1 to ``most``; note it if it is none."""
        value = fields.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            value = math.nan
        if float(value).is_integer() and 1 <= value <= most:
            return int(value)
        bound = f"from 1 to {most}" if most < math.inf else "of at least 1"
        problems.append(f"{name} {fields.get(name)!r} is not a whole number {bound}")
        return 1

    for name in ("rms_norm_eps", "routed_scaling_factor"):
        if config[name] is None or config[name] <= 0:
            problems.append(f"{name} {config[name]!r} is not above 0")
    require(config, "max_position_embeddings")
    if shape.num_layers > shape.num_dense_layers:
        experts, groups, kept = shape.num_experts, 1, 1
        if config["n_group"] is not None:
            groups = require(config, "n_group", experts)
        if groups > 1:
            kept = require(config, "topk_group", groups)
        if experts % groups:
            problems.append(f"n_group {groups} does not divide n_routed_experts {experts}")
        chosen = require(config, "num_experts_per_tok", experts)
        if groups > 1 and chosen > experts // groups * kept:
            problems.append(
                f"num_experts_per_tok: top {chosen} experts from {kept} of {groups} groups, which "
                f"have {experts // groups} each"
            )
    if yarn:
        require(yarn, "original_max_position_embeddings")
        if yarn["factor"] < 1:
            problems.append(f"rope_scaling.factor {yarn['factor']!r} is below 1")
    refuse([f"config.json: {problem}" for problem in problems], "no model has such numbers")
