"""A Hugging Face folder as the plain weights of a model: which bytes make which tensor, and how.

Every tensor is used once: a weight, a scale of one (hf/weights.py), or a tensor that repeats
another. A multimodal wrapper's text model is found by its prefix; its other tensors are counted and
left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.hf.folder import CONFIG, HFFolder, open_folder
from megatron_k2.checkpoint.hf.model import ModelShape, shape_from_config, text_config
from megatron_k2.checkpoint.hf.safetensors_header import Tensor
from megatron_k2.checkpoint.hf.weights import EMBEDDING, SCALE, Search, Weight, quantisation
from megatron_k2.checkpoint.names import IGNORED_SUFFIX, Region, regions, repeated
from megatron_k2.checkpoint.stream.units import Part


@dataclass(frozen=True)
class HFSource:
    """A checked folder: every tensor is used once."""

    folder: HFFolder
    shape: ModelShape
    weights: Mapping[str, Weight]  # by the text model's own names
    repeats: Mapping[str, str]  # tensors that must equal another
    carried: tuple[Tensor, ...]  # scales and buffers: nothing on Megatron's side
    left_out: tuple[Tensor, ...]  # other parts of a multimodal wrapper
    prefix: str
    regions: tuple[Region, ...] = field(repr=False)

    def part(self, name: str, dtype: str, first: int, last: int) -> Part:
        """Return the part that makes rows ``[first, last)`` of a weight; quantised ones in BF16."""
        weight = self.weights[name]
        is_plain = weight.stored not in ("F8_E4M3", "INT4")
        return weight.part(0, dtype if is_plain else "BF16", first, last)

    @property
    def can_be_rebuilt(self) -> bool:
        """Whether its files can come back byte for byte from the plain weights and the scales."""
        return not any(
            weight.stored in ("INT4", "F16") for weight in self.weights.values()
        ) and not (self.left_out or self.prefix)


def open_source(path: str | Path) -> HFSource:
    """Check a folder against the name table; no tensor is read.

    Raises:
        ConversionRefused: missing, extra, mis-shaped or scale-less tensors, another model type, a
            padded vocabulary: every problem in one message.
    """
    folder = open_folder(path)
    shape = shape_from_config(folder.config)
    _check_counts(folder, shape)
    stored, group_sizes = quantisation(folder)
    prefix = _prefix(folder)
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in folder.tensors.items()
        if name.startswith(prefix)
    }
    search = Search(tensors, stored, group_sizes)
    used, problems = search.used, search.problems
    wanted = tuple(regions(shape))
    weights = {}
    for region in wanted:
        weight = search.weight(region.name, region.shape)
        if weight is not None:
            weights[region.name] = weight
    shapes = {region.name: region.shape for region in wanted}
    repeats = {name: main for name, main in repeated(shape).items() if name in tensors}
    for name, main in repeats.items():
        search.weight(name, shapes[main])
    scales = [tensors[name] for name in tensors if name.endswith(SCALE) and name in used]
    buffers = [tensor for name, tensor in tensors.items() if name.endswith(IGNORED_SUFFIX)]
    used |= {tensor.name.removeprefix(prefix) for tensor in buffers}
    extra = [name for name in tensors if name not in used]
    problems += [f"{name}: nothing on Megatron's side takes it" for name in extra]
    left_out = [tensor for name, tensor in folder.tensors.items() if not name.startswith(prefix)]
    if left_out and text_config(folder.config) is folder.config:
        problems += [f"{tensor.name}: nothing on Megatron's side takes it" for tensor in left_out]
    if stored is not None and stored not in search.found and not problems:
        problems.append(
            f"{folder.path / CONFIG}: quantization_config says {stored}, and no weight is stored "
            "so; remove that entry if the weights were turned into plain numbers"
        )
    refuse(problems, f"{folder.path} does not fit its config.json")
    return HFSource(
        folder, shape, weights, repeats, (*scales, *buffers), tuple(left_out), prefix, wanted
    )


def _check_counts(folder: HFFolder, shape: ModelShape) -> None:
    """Refuse absurd numbers before every tensor of such a model is listed."""
    have = len(folder.tensors)
    for name, count in (
        ("num_hidden_layers", shape.num_layers + shape.mtp_num_layers),
        ("n_routed_experts", shape.num_experts),
    ):
        if count > have:
            raise ConversionRefused(
                f"{folder.path / CONFIG}: {name} {count}, but there are {have} tensors in all"
            )


def _prefix(folder: HFFolder) -> str:
    """Return what a wrapper puts before the text model's names; '' without an embedding."""
    found = [name.removesuffix(EMBEDDING) for name in folder.tensors if name.endswith(EMBEDDING)]
    if len(found) > 1:
        raise ConversionRefused(f"{folder.path}: {len(found)} tensors are named *{EMBEDDING}")
    return found[0] if found else ""
