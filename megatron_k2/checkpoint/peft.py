"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Format: https://github.com/huggingface/peft, docs/source/developer_guides/checkpoint.md. Names are
those of the released modelling code: every routed expert a module, ``gate_proj`` and ``up_proj``
apart; both get a copy of the one A that ``linear_fc1`` has here, so that an adapter from elsewhere
is read only if its two are equal. Which rectangle of a checkpoint makes which tensor follows from
the table of the weights themselves (names.py). Numbers keep the dtype of the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_k2.adapters import scale_of
from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.folder import read_json
from megatron_k2.checkpoint.hf.model import ModelShape, shape_from_config
from megatron_k2.checkpoint.hf.safetensors_header import Header, encode_header, read_header
from megatron_k2.checkpoint.hf.safetensors_header import Tensor as StoredTensor
from megatron_k2.checkpoint.names import Region, regions
from megatron_k2.checkpoint.tensors import TensorReader
from megatron_k2.checkpoint.torch_dist.folder import open_folder
from megatron_k2.checkpoint.torch_dist.source import MegatronSource

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of its base model."""
_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def adapter_regions(shape: ModelShape, rank: int) -> Iterator[Region]:
    """Yield the region of every tensor of an adapter on every linear layer of a model.

    Args:
        shape: of the base.
        rank: of the adapter.
    """
    for weight in regions(shape):
        layer = weight.key.removesuffix(".weight")
        if ".linear_" not in layer or layer == weight.key:
            continue
        name = PREFIX + weight.name.removesuffix(".weight")
        rows, columns = weight.shape
        experts, place, one = weight.global_shape[:-2], weight.offset[:-2], weight.size[:-2]
        yield Region(
            f"{name}.lora_A.weight", (rank, columns), f"{layer}.lora_A",
            (*experts, rank, columns), (*place, 0, 0), (*one, rank, columns), fp32=False,
        )  # fmt: skip
        yield Region(
            f"{name}.lora_B.weight", (rows, rank), f"{layer}.lora_B",
            (*weight.global_shape[:-1], rank), (*weight.offset[:-1], 0), (*weight.size[:-1], rank),
            fp32=False,
        )  # fmt: skip


def export(checkpoint: Path, target: Path, base: str | None = None) -> int:
    """Write the adapters of a Megatron checkpoint as a PEFT folder; return how many tensors.

    Args:
        checkpoint: folder of ``--save``, or one of its iterations.
        target: a folder that does not exist; it appears when it is whole.
        base: what ``base_model_name_or_path`` is to say.

    Raises:
        ConversionRefused: the checkpoint has no adapters or is not readable.
    """
    if target.exists():
        raise ConversionRefused(f"{target}: is there already; nothing is overwritten")
    folder = open_folder(checkpoint)
    arguments = folder.arguments
    rank = int(arguments.get("k2_lora_rank") or 0)
    if not rank:
        raise ConversionRefused(f"{folder.path}: its run had no --k2-lora-rank, so no adapters")
    shape = shape_from_config(config_from_arguments(arguments, None))
    everything = list(adapter_regions(shape, rank))
    found = [region for region in everything if region.key in folder.tensors]
    wrong = [
        f"{region.key}: {folder.tensors[region.key].shape}, expected {region.global_shape}"
        for region in found
        if folder.tensors[region.key].shape != region.global_shape
    ]
    refuse(wrong, f"{folder.path} does not fit its arguments")
    places = {region.name: (folder.tensors[region.key], region.offset) for region in found}
    reader = TensorReader(MegatronSource(folder, shape, places, tuple(found)))
    partial = _fresh(target)
    entries = [(one.name, places[one.name][0].dtype, one.shape) for one in found]
    with (partial / WEIGHTS).open("wb") as stream:
        stream.write(encode_header(entries, {"format": "pt"}))
        for name, dtype, _ in entries:
            stream.write(_bytes(reader.tensor(name, dtype)))
    reader.close()
    names = {one.name for one in found}
    absent = {one.name for one in everything} - names
    config = _config(rank, float(arguments["k2_lora_alpha"]), _targets(names, absent), base)
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return len(found)


def _fresh(target: Path) -> Path:
    """Return an empty folder beside the target, without what a killed run left there."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def _targets(names: Collection[str], absent: Collection[str]) -> list[str]:
    """Return PEFT's ``target_modules``: a leaf's name where all such modules have an adapter."""
    modules, others = (
        {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in some}
        for some in (names, absent)
    )
    partly = {module.rpartition(".")[2] for module in others}
    found = set()
    for module in modules:
        leaf = module.rpartition(".")[2]
        # Modules are matched by the end of their name: "mlp.gate_proj" is a dense layer's alone.
        inside = module.split(".", 3)[3]  # model.layers.N.
        found.add(inside if leaf in partly else leaf)
    return sorted(found)


def _config(rank: int, alpha: float, targets: list[str], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
    }


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as it lies in a folder.

    Attributes:
        path: the folder.
        rank: of A and B.
        scale: alpha / rank.
        header: of the weights.
    """

    path: Path
    rank: int
    scale: float
    header: Header

    @cached_property
    def _by_name(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.header.tensors}

    def modules(self) -> set[str]:
        """Return the names of the base's modules that it changes."""
        names = (tensor.name for tensor in self.header.tensors)
        return {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names}

    def rows(self, name: str, first: int, last: int, dtype: str = "F32") -> Tensor:
        """Return rows ``[first, last)`` of a tensor."""
        return self.tensor(name, dtype)[first:last]

    def tensor(self, name: str, dtype: str = "F32") -> Tensor:
        """Return a tensor by its name, in a dtype of safetensors."""
        one = self._by_name[name]
        with one.path.open("rb") as stream:
            stream.seek(one.start)
            data = bytearray(stream.read(one.num_bytes))
        return torch.frombuffer(data, dtype=_TORCH[one.dtype]).view(one.shape).to(_TORCH[dtype])

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] of a module, fp32."""
        down, up = (self.tensor(f"{PREFIX}{module}.lora_{one}.weight") for one in "AB")
        return down, up


def open_peft(path: Path) -> PeftFolder:
    """Read and check an adapter's configuration and header.

    Raises:
        ConversionRefused: it is none, or one whose function is not ``W + alpha / r B A``.
    """
    config = read_json(path / CONFIG)
    _check_config(path, config)
    rank = config["r"]
    header = read_header(path / WEIGHTS)
    problems, seen = [], set()
    for tensor in header.tensors:
        seen.add(tensor.name)
        module, _, factor = tensor.name.rpartition(".lora_")
        axis = {"A.weight": 0, "B.weight": 1}.get(factor)
        if not module.startswith(PREFIX) or axis is None or tensor.dtype not in _TORCH:
            problems.append(f"{tensor.name}: {tensor.dtype}: not a matrix of an adapter")
        elif len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            problems.append(f"{tensor.name}: {tensor.shape}, adapter_config.json says r={rank}")
    for name in seen:
        twin = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else None
        if (twin or name.replace(".lora_B.", ".lora_A.")) not in seen:
            problems.append(f"{name}: its other factor is missing")
    refuse(sorted(problems), str(path / WEIGHTS))
    return PeftFolder(path, rank, scale_of(rank, float(config.get("lora_alpha", rank))), header)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    plain: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_dora": (False, None),
        "use_rslora": (False, None),
        "fan_in_fan_out": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "modules_to_save": ([], None),
        "target_parameters": ([], None),
    }
    problems = [
        f"{key}: {config.get(key)!r}; read is {allowed[0]!r}"
        for key, allowed in plain.items()
        if config.get(key) not in allowed
    ]
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        problems.append(f"r: {config.get('r')!r} is no rank")
    refuse(problems, str(path / CONFIG))
