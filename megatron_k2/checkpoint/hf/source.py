"""A Hugging Face folder as the plain weights of a model: which bytes make which tensor, and how.

Weights are stored plain (bf16, fp16, fp32), as block FP8 with ``weight_scale_inv`` or, in the INT4
releases, as ``weight_packed`` with ``weight_scale`` and ``weight_shape``; which, is seen from the
tensors themselves and must agree with ``quantization_config``. A multimodal wrapper's text model
is found by its prefix; its other tensors are counted and left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.fp8_blocks import BLOCK, num_blocks
from megatron_k2.checkpoint.hf.folder import HFFolder, open_folder
from megatron_k2.checkpoint.hf.model import ModelShape, shape_from_config, text_config
from megatron_k2.checkpoint.hf.safetensors_header import Tensor
from megatron_k2.checkpoint.names import IGNORED_SUFFIX, Region, regions, repeated
from megatron_k2.checkpoint.stream.kernels import cast
from megatron_k2.checkpoint.stream.units import Matrix, Part, take_rows, whole

SCALE = "_scale_inv"
_ANCHOR = "model.embed_tokens.weight"
_FLOATS = ("BF16", "F16", "F32")
_INT4_PARTS = ("_packed", "_scale", "_shape")


@dataclass(frozen=True)
class Weight:
    """One tensor's inputs and the kernel that makes plain numbers of them."""

    name: str
    shape: tuple[int, ...]
    stored: str  # dtype as stored: BF16, F16, F32, F8_E4M3 or INT4
    inputs: tuple[Matrix, ...]

    def rows(self, first: int, last: int) -> tuple[Matrix, ...]:
        """Return the inputs of rows ``[first, last)``; ``first`` on a block's edge."""
        weights = take_rows(self.inputs[0], first, last)
        if self.stored == "F8_E4M3":
            scales = take_rows(self.inputs[1], first // BLOCK, -(-last // BLOCK))
            return weights, scales
        return (weights, *(take_rows(matrix, first, last) for matrix in self.inputs[1:]))

    def part(self, at: int, dtype: str, first: int, last: int) -> Part:
        """Return the part that makes rows ``[first, last)`` in ``dtype``."""
        columns = self.shape[-1]
        inputs = self.rows(first, last)
        if self.stored == "F8_E4M3":
            kernel = "dequantise_fp8"
        elif self.stored == "INT4":
            kernel = "dequantise_int4"
        else:
            kernel = cast(self.stored, dtype)
        return Part(at, kernel, dtype, (last - first, columns), inputs, name=self.name)

    @property
    def plain_dtype(self) -> str:
        """The dtype of its numbers: quantised weights are bf16."""
        return "F32" if self.stored == "F32" else "BF16"


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

    @property
    def is_quantised(self) -> bool:
        """Whether any weight is stored as FP8 or INT4."""
        return any(weight.stored in ("F8_E4M3", "INT4") for weight in self.weights.values())

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
    _check_quantisation(folder)
    prefix = _prefix(folder)
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in folder.tensors.items()
        if name.startswith(prefix)
    }
    problems: list[str] = []
    used: set[str] = set()
    wanted = tuple(regions(shape))
    weights = {}
    for region in wanted:
        weight = _weight(region.name, region.shape, tensors, used, problems)
        if weight is not None:
            weights[region.name] = weight
    shapes = {region.name: region.shape for region in wanted}
    repeats = {name: main for name, main in repeated(shape).items() if name in tensors}
    for name, main in repeats.items():
        _weight(name, shapes[main], tensors, used, problems)
    scales = [tensors[name] for name in tensors if name.endswith(SCALE) and name in used]
    buffers = [tensor for name, tensor in tensors.items() if name.endswith(IGNORED_SUFFIX)]
    used |= {tensor.name.removeprefix(prefix) for tensor in buffers}
    extra = [name for name in tensors if name not in used]
    problems += [f"{name}: nothing on Megatron's side takes it" for name in extra]
    left_out = [tensor for name, tensor in folder.tensors.items() if not name.startswith(prefix)]
    if left_out and text_config(folder.config) is folder.config:
        problems += [f"{tensor.name}: nothing on Megatron's side takes it" for tensor in left_out]
    refuse(problems, f"{folder.path} does not fit its config.json")
    return HFSource(
        folder, shape, weights, repeats, (*scales, *buffers), tuple(left_out), prefix, wanted
    )


def _prefix(folder: HFFolder) -> str:
    found = [name.removesuffix(_ANCHOR) for name in folder.tensors if name.endswith(_ANCHOR)]
    if len(found) != 1:
        raise ConversionRefused(f"{folder.path}: {len(found)} tensors are named *{_ANCHOR}")
    return found[0]


def _check_quantisation(folder: HFFolder) -> None:
    outer, inner = folder.config, text_config(folder.config)
    quantisation: Any = outer.get("quantization_config") or inner.get("quantization_config")
    if quantisation is None:
        return
    method = quantisation.get("quant_method")
    where = f"{folder.path / 'config.json'}: quantization_config"
    if method == "fp8":
        block, form = quantisation.get("weight_block_size"), quantisation.get("fmt", "e4m3")
        if block != [BLOCK, BLOCK] or form != "e4m3":
            raise ConversionRefused(
                f"{where}: {form} in blocks of {block}; only e4m3 in [128, 128]"
            )
        return
    if method == "compressed-tensors":
        _check_int4(quantisation, where)
        return
    raise ConversionRefused(f"{where}: quant_method {method!r}; only fp8 and compressed-tensors")


def _check_int4(quantisation: Mapping[str, Any], where: str) -> None:
    for group in quantisation.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        plain = (
            weights.get("num_bits") == 4
            and weights.get("type", "int") == "int"
            and weights.get("symmetric", True)
            and weights.get("strategy", "group") == "group"
            and not weights.get("actorder")
        )
        if not plain or quantisation.get("format", "pack-quantized") != "pack-quantized":
            raise ConversionRefused(
                f"{where}: only symmetric INT4 weights in groups, pack-quantized; not {weights}"
            )


def _weight(
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    used: set[str],
    problems: list[str],
) -> Weight | None:
    """Return how a tensor is stored; note what is wrong with it."""
    tensor = tensors.get(name)
    if tensor is None and name + "_packed" in tensors:
        return _int4_weight(name, shape, tensors, used, problems)
    if tensor is None:
        problems.append(f"{name}: missing")
        return None
    used.add(name)
    if tensor.shape != shape:
        padded = " (a padded vocabulary? set vocab_size to the rows)" * (
            tensor.shape[1:] == shape[1:] and name in (_ANCHOR, "lm_head.weight")
        )
        problems.append(f"{name}: {_times(tensor.shape)}, config.json says {_times(shape)}{padded}")
        return None
    main = whole(str(tensor.path), tensor.start, tensor.dtype, shape)
    if tensor.dtype in _FLOATS:
        return Weight(name, shape, tensor.dtype, (main,))
    if tensor.dtype != "F8_E4M3" or len(shape) != 2:
        problems.append(f"{name}: {tensor.dtype} is not among the dtypes that are read")
        return None
    scale = tensors.get(name + SCALE)
    if scale is None:
        problems.append(f"{name}: FP8, but {name + SCALE} is missing")
        return None
    used.add(name + SCALE)
    if scale.shape != num_blocks(shape) or scale.dtype not in ("F32", "BF16"):
        expected = _times(num_blocks(shape))
        problems.append(f"{name + SCALE}: {scale.dtype} {_times(scale.shape)}, not F32 {expected}")
        return None
    scales = whole(str(scale.path), scale.start, scale.dtype, scale.shape)
    return Weight(name, shape, "F8_E4M3", (main, scales))


def _int4_weight(
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    used: set[str],
    problems: list[str],
) -> Weight | None:
    parts = [tensors.get(name + suffix) for suffix in _INT4_PARTS]
    used |= {name + suffix for suffix in _INT4_PARTS}
    packed, scale, _ = parts
    if packed is None or scale is None or parts[2] is None:
        missing = [name + s for s, part in zip(_INT4_PARTS, parts, strict=True) if part is None]
        problems += [f"{lost}: missing" for lost in missing]
        return None
    rows, columns = shape
    groups = scale.shape[-1]
    fits = (
        (packed.dtype, packed.shape) == ("I32", (rows, -(-columns // 8)))
        and scale.dtype in _FLOATS
        and scale.shape == (rows, groups)
        and groups > 0
        and columns % groups == 0
    )
    if not fits:
        problems.append(
            f"{name}: packed {packed.dtype} {_times(packed.shape)} with scales {scale.dtype} "
            f"{_times(scale.shape)} do not make INT4 {_times(shape)}"
        )
        return None
    inputs = tuple(whole(str(t.path), t.start, t.dtype, t.shape) for t in (packed, scale))
    return Weight(name, shape, "INT4", inputs)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
