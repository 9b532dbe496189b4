"""How weights are stored in a Hugging Face folder, and the kernels that make plain numbers of them.

Plain (bf16, fp16, fp32), as block FP8 with ``weight_scale_inv`` or, in the INT4 releases, as
``weight_packed`` with ``weight_scale`` and ``weight_shape``. It is seen from the tensors themselves
and must agree with ``quantization_config``: a loader that goes by that alone would read noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.fp8_blocks import BLOCK, num_blocks
from megatron_k2.checkpoint.hf.folder import CONFIG, HFFolder
from megatron_k2.checkpoint.hf.model import text_config
from megatron_k2.checkpoint.hf.safetensors_header import Tensor
from megatron_k2.checkpoint.stream.kernels import cast
from megatron_k2.checkpoint.stream.units import Matrix, Part, as_matrix, take_rows, whole

SCALE = "_scale_inv"
EMBEDDING = "model.embed_tokens.weight"
_VOCABULARY = (EMBEDDING, "lm_head.weight")
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


def quantisation(folder: HFFolder) -> tuple[str | None, frozenset[int]]:
    """Return how config.json says that weights are stored, and the sizes of INT4's groups.

    Raises:
        ConversionRefused: in a way that is not read.
    """
    outer, inner = folder.config, text_config(folder.config)
    settings: Any = outer.get("quantization_config") or inner.get("quantization_config")
    if settings is None:
        return None, frozenset()
    where = f"{folder.path / CONFIG}: quantization_config"
    if not isinstance(settings, Mapping):
        raise ConversionRefused(f"{where}: {settings!r} is no object")
    method = settings.get("quant_method")
    if method == "fp8":
        block, form = settings.get("weight_block_size"), settings.get("fmt", "e4m3")
        if block != [BLOCK, BLOCK] or form != "e4m3":
            raise ConversionRefused(
                f"{where}: {form} in blocks of {block}; only e4m3 in [128, 128]"
            )
        return "F8_E4M3", frozenset()
    if method == "compressed-tensors":
        return "INT4", _group_sizes(settings, where)
    raise ConversionRefused(f"{where}: quant_method {method!r}; only fp8 and compressed-tensors")


def _group_sizes(settings: Mapping[str, Any], where: str) -> frozenset[int]:
    groups = settings.get("config_groups")
    sizes: set[Any] = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        weights = weights if isinstance(weights, Mapping) else {}
        size = weights.get("group_size")
        plain = (
            weights.get("num_bits") == 4
            and weights.get("type", "int") == "int"
            and weights.get("symmetric", True) is True
            and weights.get("strategy", "group") == "group"
            and not weights.get("actorder")
            and type(size) is int
            and size > 0
        )
        if not plain or settings.get("format", "pack-quantized") != "pack-quantized":
            raise ConversionRefused(
                f"{where}: only symmetric INT4 weights in groups, pack-quantized; not {weights}"
            )
        sizes.add(size)
    if not sizes:
        raise ConversionRefused(f"{where}: no config_groups with weights")
    return frozenset(sizes)


class Search:
    """Finds weight after weight in a folder, and notes what is used and what is wrong."""

    def __init__(
        self, tensors: Mapping[str, Tensor], stored: str | None, group_sizes: frozenset[int]
    ) -> None:
        self._tensors, self._stored, self._group_sizes = tensors, stored, group_sizes
        self.used: set[str] = set()
        self.problems: list[str] = []
        self.found: set[str] = set()  # ways in which weights are stored

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight | None:
        """Return how a tensor is stored; None, and a problem noted, if it is not right."""
        tensor = self._tensors.get(name)
        if tensor is None and name + "_packed" in self._tensors:
            return self._int4(name, shape)
        if tensor is None:
            self.problems.append(f"{name}: missing")
            return None
        self.used.add(name)
        if tensor.shape != shape:
            self.used.add(name + SCALE)
            padded = " (a padded vocabulary? set vocab_size to the rows)" * (
                tensor.shape[1:] == shape[1:] and name in _VOCABULARY
            )
            self.problems.append(
                f"{name}: {_times(tensor.shape)}, config.json says {_times(shape)}{padded}"
            )
            return None
        main = whole(str(tensor.path), tensor.start, tensor.dtype, shape)
        if tensor.dtype in _FLOATS:
            return Weight(name, shape, tensor.dtype, (main,))
        if tensor.dtype != "F8_E4M3" or len(shape) != 2:
            self.problems.append(f"{name}: {tensor.dtype} is not among the dtypes that are read")
            return None
        return self._fp8(name, shape, main)

    def _fp8(self, name: str, shape: tuple[int, ...], main: Matrix) -> Weight | None:
        scale = self._tensors.get(name + SCALE)
        self._expect("F8_E4M3", name)
        if scale is None:
            self.problems.append(f"{name}: FP8, but {name + SCALE} is missing")
            return None
        self.used.add(name + SCALE)
        if scale.shape != num_blocks(shape) or scale.dtype not in ("F32", "BF16"):
            expected = _times(num_blocks(shape))
            self.problems.append(
                f"{name + SCALE}: {scale.dtype} {_times(scale.shape)}, not F32 {expected}"
            )
            return None
        scales = whole(str(scale.path), scale.start, scale.dtype, scale.shape)
        return Weight(name, shape, "F8_E4M3", (main, scales))

    def _int4(self, name: str, shape: tuple[int, ...]) -> Weight | None:
        parts = [self._tensors.get(name + suffix) for suffix in _INT4_PARTS]
        self.used |= {name + suffix for suffix in _INT4_PARTS}
        self._expect("INT4", name)
        packed, scale, _ = parts
        if packed is None or scale is None or parts[2] is None:
            missing = [name + s for s, part in zip(_INT4_PARTS, parts, strict=True) if part is None]
            self.problems += [f"{lost}: missing" for lost in missing]
            return None
        rows, columns = as_matrix(shape)
        fits = (
            len(shape) == 2
            and (packed.dtype, packed.shape) == ("I32", (rows, -(-columns // 8)))
            and scale.dtype in _FLOATS
            and any(scale.shape == (rows, columns / size) for size in self._group_sizes)
        )
        if not fits:
            sizes = " or ".join(map(str, sorted(self._group_sizes)))
            self.problems.append(
                f"{name}: packed {packed.dtype} {_times(packed.shape)} with scales {scale.dtype} "
                f"{_times(scale.shape)} do not make INT4 {_times(shape)} in groups of {sizes}"
            )
            return None
        inputs = tuple(whole(str(t.path), t.start, t.dtype, t.shape) for t in (packed, scale))
        return Weight(name, shape, "INT4", inputs)

    def _expect(self, stored: str, name: str) -> None:
        """Note a weight that is stored otherwise than config.json says."""
        self.found.add(stored)
        if stored != self._stored:
            self.problems.append(
                f"{name}: stored as {stored}, and config.json's quantization_config says "
                f"{self._stored or 'nothing'}"
            )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
