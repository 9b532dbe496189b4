"""``--k2-lora-load DIR``: a run's adapters start from a PEFT folder.

Every rank reads the rectangles that its layout gives it, as ``--k2-load-hf`` does for the base
(load_hf.py). Adapters in the checkpoint of ``--load`` are read afterwards and win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from megatron_k2.adapters import is_adapter, scale_of
from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.model import shape_from_config
from megatron_k2.checkpoint.load_hf import copy_overlap_
from megatron_k2.checkpoint.names import Region
from megatron_k2.checkpoint.peft import PeftFolder, adapter_regions, open_peft


@dataclass(frozen=True)
class LoadPeft:
    """A hook that Megatron's model builder calls with this rank's wrapped model chunks.

    Attributes:
        folder: of PEFT.
        arguments: of the run.
    """

    folder: Path
    arguments: Mapping[str, Any]

    def __call__(self, chunks: list[Any]) -> list[Any]:
        """Fill every adapter; return the chunks.

        Raises:
            ConversionRefused: the folder is not of these adapters.
        """
        peft, models = open_peft(self.folder), unwrap_model(chunks)
        config = models[0].config
        rank, scale = config.k2_lora_rank, scale_of(config.k2_lora_rank, config.k2_lora_alpha)
        if (peft.rank, peft.scale) != (rank, scale):
            raise ConversionRefused(
                f"--k2-lora-load {self.folder}: r={peft.rank}, lora_alpha="
                f"{peft.scale * peft.rank:g}; give --k2-lora-rank {peft.rank} --k2-lora-alpha "
                f"{peft.scale * peft.rank:g}, found {rank} and {scale * rank:g}"
            )
        shape = shape_from_config(config_from_arguments(self.arguments, None))
        by_key = _regions(peft, list(adapter_regions(shape, rank)), config.k2_lora_targets)
        for model in models:
            _load_(model, peft, by_key)
        return chunks


def _regions(peft: PeftFolder, known: list[Region], targets: list[str]) -> dict[str, list[Region]]:
    """Return the folder's tensors by key of a checkpoint, each rectangle once.

    Raises:
        ConversionRefused: a tensor that no adapter of the run takes, or gate and up that differ.
    """
    table = {region.name: region for region in known}
    by_key: dict[str, list[Region]] = {}
    problems = []
    for tensor in peft.header.tensors:
        region = table.get(tensor.name)
        if region is None or region.shape != tensor.shape:
            problems.append(f"{tensor.name}: {tensor.shape}: not of this model")
            continue
        layer = region.key.split(".", 3)[3].rpartition(".")[0]
        if layer.replace("experts.experts.", "experts.") not in targets:
            problems.append(f"{tensor.name}: --k2-lora-targets does not name its layer")
            continue
        twins = [one for one in by_key.setdefault(region.key, []) if one.offset == region.offset]
        if not twins:
            by_key[region.key].append(region)
        elif not torch.equal(peft.tensor(twins[0].name), peft.tensor(region.name)):
            problems.append(f"{tensor.name}: differs from {twins[0].name}; they share one here")
    refuse(problems, f"--k2-lora-load {peft.path} does not fit the run")
    return by_key


@torch.no_grad()
def _load_(model: Any, peft: PeftFolder, by_key: Mapping[str, list[Region]]) -> None:
    described = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    apply_factories(described)
    for part in nested_values(described):
        if not (isinstance(part, ShardedTensor) and is_adapter(part.key)):
            continue
        if part.key not in by_key:
            raise ConversionRefused(
                f"--k2-lora-load {peft.path}: has nothing for {part.key}; --k2-lora-targets names "
                "more layers than it has"
            )
        extent = (1,) * (len(part.global_shape) - part.data.ndim) + tuple(part.data.shape)
        for region in by_key[part.key]:
            copy_overlap_(part.data.view(extent), tuple(part.global_offset), region, peft)
