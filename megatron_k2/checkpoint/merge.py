"""Adds a PEFT adapter to the weights of a Hugging Face folder: ``W + alpha / r B A``.

The folder is copied and only the bytes of changed weights (and, in FP8, of their scales) are
written over, so that everything else stays byte for byte. Sums are fp32 and rounded once to the
weight's dtype; of FP8 in blocks of 128, the bf16 values are summed, rounded to bf16 and stored with
fresh scales of amax / 448. Left out: INT4. One weight is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_k2.checkpoint import fp8_blocks
from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.hf import safetensors_header as safetensors
from megatron_k2.checkpoint.hf.folder import open_folder
from megatron_k2.checkpoint.hf.weights import SCALE
from megatron_k2.checkpoint.intact import MANIFEST
from megatron_k2.checkpoint.peft import PeftFolder, open_peft

_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def merge(base: Path, adapter: Path, target: Path) -> tuple[int, int]:
    """Write a base with an adapter in it; return how many tensors changed and how many did not.

    Args:
        base: Hugging Face folder, BF16, FP32, FP16 or block FP8.
        adapter: PEFT folder.
        target: a folder that does not exist; it appears when it is whole.

    Raises:
        ConversionRefused: the two do not fit.
    """
    if target.exists():
        raise ConversionRefused(f"{target}: is there already; nothing is overwritten")
    folder, peft = open_folder(base), open_peft(adapter)
    tensors = folder.tensors
    modules = sorted(peft.modules())
    _check(tensors, peft, modules, base)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial, ignore=shutil.ignore_patterns(MANIFEST))
    changed = 0
    for module in modules:
        weight = tensors[f"{module}.weight"]
        down, up = peft.factors(module)
        delta = peft.scale * up @ down
        if weight.dtype == "F8_E4M3":
            scales = tensors[weight.name + SCALE]
            _write_fp8(partial, weight, scales, delta)
            changed += 2
        else:
            made = (_read(weight).float() + delta).to(_TORCH[weight.dtype])
            _write(partial, weight, made)
            changed += 1
    os.replace(partial, target)
    return changed, len(tensors) - changed


def _check(
    tensors: Mapping[str, safetensors.Tensor], peft: PeftFolder, modules: list[str], base: Path
) -> None:
    """Refuse an adapter of another model, before anything is copied."""
    shapes = {tensor.name: tensor.shape for tensor in peft.header.tensors}
    problems = []
    for module in modules:
        weight = tensors.get(f"{module}.weight")
        down, up = (shapes[f"base_model.model.{module}.lora_{one}.weight"] for one in "AB")
        if weight is None:
            problems.append(f"{module}: not in the base, or INT4; convert it to BF16 first")
        elif weight.shape != (up[0], down[1]):
            problems.append(f"{module}: {weight.shape}, the adapter's is {(up[0], down[1])}")
        elif weight.dtype == "F8_E4M3" and _scales_of(tensors, weight) is None:
            problems.append(f"{module}: FP8 without fp32 scales of 128 x 128 blocks")
        elif weight.dtype != "F8_E4M3" and weight.dtype not in _TORCH:
            problems.append(f"{module}: {weight.dtype} is not among the dtypes that are merged")
    refuse(problems, f"{peft.path} does not fit {base}")


def _scales_of(
    tensors: Mapping[str, safetensors.Tensor], weight: safetensors.Tensor
) -> safetensors.Tensor | None:
    """Return the tensor of an FP8 weight's scales, None if it is not of the kind that is read."""
    scales = tensors.get(weight.name + SCALE)
    if scales is None or scales.dtype != "F32":
        return None
    return scales if scales.shape == fp8_blocks.num_blocks(weight.shape) else None


def _read(tensor: safetensors.Tensor) -> Tensor:
    """Return a tensor as it is stored, FP8 as bytes."""
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        data = bytearray(stream.read(tensor.num_bytes))
    dtype = _TORCH.get(tensor.dtype, torch.uint8)
    return torch.frombuffer(data, dtype=dtype).view(tensor.shape)


def _write(folder: Path, tensor: safetensors.Tensor, values: Tensor) -> None:
    """Write over a tensor's bytes in the copy of its file."""
    data = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert len(data) == tensor.num_bytes, tensor.name
    with (folder / tensor.path.name).open("r+b") as stream:
        stream.seek(tensor.start)
        stream.write(data)


def _write_fp8(
    folder: Path, weight: safetensors.Tensor, scales: safetensors.Tensor, delta: Tensor
) -> None:
    bits, blocks = _read(weight).numpy(), _read(scales).numpy()
    values = np.empty(weight.shape, np.uint16)
    fp8_blocks.dequantise(bits, blocks, values)
    wide = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float() + delta
    narrow = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    fresh = fp8_blocks.block_scales(narrow)
    fp8_blocks.quantise(narrow, fresh, bits)
    _write(folder, weight, torch.from_numpy(bits))
    _write(folder, scales, torch.from_numpy(fresh))
