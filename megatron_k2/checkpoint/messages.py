"""What the plugins of Megatron's own ``tools/checkpoint/convert.py`` say to each other.

A loader puts messages with whole tensors into a queue, a saver takes them out in the same order:
metadata, then one message a layer and, because 384 experts do not fit one, one more an expert.
The tensors have Megatron's names from names.py, whatever was loaded: upstream's own messages have
no place for latent attention and for gate and up of an expert. One tensor is in memory at a time on
either side, and what waits in the queue.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_k2.checkpoint import intact
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.model import ModelShape, shape_from_config, text_config
from megatron_k2.checkpoint.hf.safetensors_header import encode_header
from megatron_k2.checkpoint.hf.source import open_source as open_hf
from megatron_k2.checkpoint.names import Region, regions, repeated
from megatron_k2.checkpoint.stream.direct_io import pages_up
from megatron_k2.checkpoint.tensors import TensorReader
from megatron_k2.checkpoint.to_megatron import directory, finish
from megatron_k2.checkpoint.torch_dist import folder as dist_folder
from megatron_k2.checkpoint.torch_dist.blobs import DTYPES, make_frame
from megatron_k2.checkpoint.torch_dist.metadata import Place
from megatron_k2.checkpoint.torch_dist.source import open_source as open_dist

FORMATS = ("torch_dist", "hf")
Get = Callable[[], Any]
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def table(shape: ModelShape) -> list[Region]:
    """Return all tensors in the order they are sent; those that repeat another at the end."""
    wanted = list(regions(shape))
    by_name = {region.name: region for region in wanted}
    copies = ((name, by_name[main]) for name, main in repeated(shape).items())
    return wanted + [replace(region, name=name) for name, region in copies]


def message_of(region: Region) -> str:
    """Return the name of the message that carries a Hugging Face tensor."""
    layer, expert = _LAYER.match(region.name), _EXPERT.search(region.name)
    if layer is None:
        return "embeddings" if region.key.startswith("embedding") else "output"
    return f"transformer layer {layer[1]}" + (f" expert {expert[1]}" if expert else "")


def messages(path: Path) -> Iterator[Any]:
    """Yield the metadata, then every message's dictionary, of a folder of either kind.

    Raises:
        ConversionRefused: it is neither, or no model of the family.
    """
    if dist_folder.is_checkpoint(path):
        folder = dist_folder.open_folder(path)
        config = config_from_arguments(folder.arguments)
        source: Any = open_dist(folder, shape_from_config(config))
        iteration = folder.iteration
    else:
        source, iteration = open_hf(path), 0
        config = dict(text_config(source.folder.config))
    yield _metadata(config, source.shape, iteration)
    reader = TensorReader(source)
    copies = repeated(source.shape)
    for name, group in itertools.groupby(table(source.shape), message_of):
        parts = {
            region.name: reader.tensor(copies.get(region.name, region.name), _dtype(region))
            for region in group
        }
        yield {"name": name, **parts}
    reader.close()
    yield "done"


def _dtype(region: Region) -> str:
    return "F32" if region.fp32 else "BF16"


def _metadata(config: dict[str, Any], shape: ModelShape, iteration: int) -> argparse.Namespace:
    """Return what upstream's savers expect, and the configuration."""
    config.pop("quantization_config", None)
    return argparse.Namespace(
        model_type="GPT", num_layers=shape.num_layers, hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads, num_experts=shape.num_experts,
        seq_length=config.get("max_position_embeddings", 4096),
        max_position_embeddings=config.get("max_position_embeddings", 4096),
        position_embedding_type="rope", tokenizer_type="NullTokenizer", iteration=iteration,
        params_dtype=torch.bfloat16, output_layer=True, linear_bias=False, norm_has_bias=False,
        true_vocab_size=shape.vocab_size, make_vocab_size_divisible_by=None,
        consumed_train_samples=0, consumed_valid_samples=0, k2_config=config,
    )  # fmt: skip


def save(get: Get, target: Path, kind: str) -> None:
    """Take all messages and write a checkpoint that ``--load`` or transformers reads.

    Args:
        get: returns the next message.
        target: ``release/`` and the tracker are written into it, or a Hugging Face folder.
        kind: ``torch_dist`` or ``hf``.

    Raises:
        ConversionRefused: the loader is not this project's, ended early, or the target exists.
    """
    metadata = get()
    config = getattr(metadata, "k2_config", None)
    if config is None:
        raise ConversionRefused("--saver k2: needs the messages of --loader k2")
    folder = target / intact.RELEASE if kind == "torch_dist" else target
    if folder.exists():
        raise ConversionRefused(f"{folder}: is there already; remove it, or give another")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    shape = shape_from_config(config)
    tensors = _tensors(get, shape)
    if kind == "torch_dist":
        copies = repeated(shape)  # which Megatron shares
        own = ((region, tensor) for region, tensor in tensors if region.name not in copies)
        places = _write_archives(own, partial)
        for name, data in directory(config, shape, places).items():
            (partial / name).write_bytes(data)
        finish(partial)
    else:
        _write_safetensors(tensors, table(shape), config, partial)
    partial.rename(folder)
    if kind == "torch_dist":
        intact.publish_text(target / intact.TRACKER, intact.RELEASE)


def _tensors(get: Get, shape: ModelShape) -> Iterator[tuple[Region, Tensor]]:
    """Yield every tensor of the table in its order; each must come and no other."""
    for name, group in itertools.groupby(table(shape), message_of):
        message = get()
        if not isinstance(message, dict) or message.pop("name") != name:
            raise ConversionRefused(f"the loader ended, or sent another message than {name!r}")
        for region in group:
            tensor = message.pop(region.name, None)
            if tensor is None or tuple(tensor.shape) != region.shape:
                raise ConversionRefused(f"{name}: no {region.name} of {region.shape}")
            yield region, tensor
        if message:
            raise ConversionRefused(f"{name}: {', '.join(message)} has no place in the table")
    if get() != "done":
        raise ConversionRefused("the loader sends more than the model's tensors")


def _write_archives(tensors: Iterator[tuple[Region, Tensor]], folder: Path) -> list[Place]:
    """Write one archive a tensor, one file a layer; return their places."""
    places: list[Place] = []
    for number, (_, group) in enumerate(itertools.groupby(tensors, lambda pair: _file(pair[0]))):
        path, position = f"__{number}_0.distcp", 0
        with open(folder / path, "wb") as file:
            for region, tensor in group:
                dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
                frame = make_frame(dtype, region.size)
                file.write(frame.before)
                file.write(_bytes(tensor))
                num_bytes = file.write(frame.after) + len(frame.before) + tensor.nbytes
                file.write(bytes(pages_up(num_bytes) - num_bytes))
                places.append(
                    Place(
                        region.key, region.global_shape, region.offset, region.size, dtype, path,
                        position, num_bytes,
                    )
                )  # fmt: skip
                position += pages_up(num_bytes)
    return places


def _file(region: Region) -> str:
    layer = _LAYER.match(region.name)
    return layer[1] if layer else message_of(region)


def _write_safetensors(
    tensors: Iterator[tuple[Region, Tensor]],
    wanted: list[Region],
    config: dict[str, Any],
    folder: Path,
) -> None:
    """Write one shard a layer, the index and config.json."""
    shards = [list(group) for _, group in itertools.groupby(wanted, _file)]
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        entries = [(region.name, _dtype(region), region.shape) for region in shard]
        with open(folder / name, "wb") as file:
            file.write(encode_header(entries, {"format": "pt"}))
            for region, tensor in itertools.islice(tensors, len(shard)):
                file.write(_bytes(tensor))
                weight_map[region.name] = name
    next(tensors, None)  # nothing may follow
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
