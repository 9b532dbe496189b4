"""YaRN in Megatron's modules: the rotary embedding of K2's MLA, and a change of its factor.

``K2YarnRotaryEmbedding`` replaces upstream's ``YarnRotaryEmbedding`` in the local and the
Transformer Engine path. Upstream multiplies position and frequency in fp32 (0.008 rad off at
position 131,071), keeps every embedding alive in an ``lru_cache`` keyed by the module, and stores
4,096 cosines a layer; here angles are exact, and one table serves all layers. Plain RoPE stays
upstream's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_k2.model.yarn import (
    YarnSettings,
    yarn_angles,
    yarn_attention_factor,
    yarn_softmax_scale,
)


def yarn_settings_from_config(config: MLATransformerConfig) -> YarnSettings:
    """Read the YaRN fields of a transformer configuration."""
    names = {field.name for field in dataclasses.fields(YarnSettings)} - {"dim"}
    fields: dict[str, Any] = {name: getattr(config, name) for name in names}
    return YarnSettings(dim=config.qk_pos_emb_head_dim, **fields)


@functools.lru_cache(maxsize=8)
def _angles(settings: YarnSettings, length: int, offset: int, device: torch.device) -> Tensor:
    """Return upstream's embedding layout, fp32 [length, 1, 1, dim]: the angles twice."""
    angles = yarn_angles(settings, length, offset, device)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


@functools.lru_cache(maxsize=8)
def _cos_sin(
    settings: YarnSettings, length: int, offset: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return scaled cosines and sines, each [length, 1, 1, dim]."""
    angles, factor = _angles(settings, length, offset, device), yarn_attention_factor(settings)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class K2YarnRotaryEmbedding(YarnRotaryEmbedding):  # type: ignore[misc]
    """Upstream's YaRN embedding with exact angles and a factor that may change.

    Args:
        settings: the YaRN fields; ``settings`` may be replaced between steps.
        cp_group: context-parallel group whose share of the positions is returned.

    The attribute ``device`` says where angles are wanted; the attention sets it to its input's.
    ``places`` are those of packed documents in a whole row, int32 [documents + 1], or None: with
    them ``forward`` gives every token the angles of its place in its document, which upstream
    applies at once; without, it goes through the documents one by one.
    """

    def __init__(
        self, settings: YarnSettings, cp_group: torch.distributed.ProcessGroup | None = None
    ) -> None:
        torch.nn.Module.__init__(self)  # upstream's builds fp32 tables that are not used here
        self.settings = settings
        self.device = torch.device("cpu")
        self.rotary_interleaved = False
        self.cp_group = cp_group
        self.places: Tensor | None = None

    def get_emb(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, float]:
        """Return (angles fp32 [max_seq_len, 1, 1, dim] modulo 2 pi, factor of cos and sin)."""
        factor = yarn_attention_factor(self.settings)
        return _angles(self.settings, max_seq_len, offset, self.device), factor

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> tuple[Tensor, float]:
        """Return this context-parallel rank's angles (all of them for packed sequences)."""
        angles, factor = self.get_emb(max_seq_len, offset)
        group = self.cp_group if cp_group is None else cp_group
        if group is not None and group.size() > 1 and not packed_seq:
            angles = get_pos_emb_on_this_cp_rank(angles, 0, group)
        if packed_seq and self.places is not None:
            angles = angles[packed_positions(self.places)]
        return angles, factor

    def get_cached_cos_sin(
        self,
        seq_len: int,
        offset: int = 0,
        dtype: torch.dtype = torch.float32,
        packed_seq: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return scaled cosines and sines, each [seq_len, 1, 1, dim] in ``dtype``."""
        group = self.cp_group
        if group is not None and group.size() > 1 and not packed_seq:
            angles, factor = self.forward(seq_len, offset)
            return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return _cos_sin(self.settings, seq_len, offset, self.device, dtype)


def packed_positions(places: Tensor) -> Tensor:
    """Return int64 [tokens], the position of every token of a packed row in its document.

    Args:
        places: int32 [documents + 1], from 0; documents without tokens are allowed.
    """
    lengths = places.diff().long()
    starts = torch.repeat_interleave(places[:-1].long(), lengths)
    return torch.arange(int(starts.numel()), device=places.device) - starts


def set_yarn_factor_(
    model: torch.nn.Module,
    rotary_scaling_factor: float,
    *,
    original_max_position_embeddings: int | None = None,
) -> int:
    """Change YaRN's factor in a built model, as between the 4k, 32k and 128k stages of K2.

    Frequencies, the factor of cos and sin, every attention's softmax scale and the configuration
    follow; weights are untouched.

    Args:
        model: a model chunk whose attention comes from the K2 spec.
        rotary_scaling_factor: the new factor, >= 1.
        original_max_position_embeddings: the length the factor stretches; None keeps it.

    Returns:
        The number of attention layers changed.

    Raises:
        ValueError: the factor is below 1, or the model has no YaRN attention to change.
    """
    changed = 0
    for module in model.modules():
        rotary = getattr(module, "rotary_pos_emb", None)
        if not isinstance(rotary, K2YarnRotaryEmbedding) or not hasattr(module, "core_attention"):
            continue
        old = rotary.settings
        length = original_max_position_embeddings or old.original_max_position_embeddings
        rotary.settings = dataclasses.replace(
            old,
            rotary_scaling_factor=rotary_scaling_factor,
            original_max_position_embeddings=length,
        )
        config = cast("MLATransformerConfig", module.config)
        config.rotary_scaling_factor = rotary_scaling_factor
        config.original_max_position_embeddings = length
        scale = yarn_softmax_scale(rotary.settings, cast("int", module.q_head_dim))
        module.softmax_scale = scale  # type: ignore[assignment]
        cast("Any", module.core_attention).set_softmax_scale_(scale)
        changed += 1
    if not changed:
        raise ValueError(
            "this model has no YaRN attention of the K2 spec: build it with --rope-type yarn and "
            "--spec megatron_k2.model.specs get_k2_decoder_block_spec"
        )
    return changed
