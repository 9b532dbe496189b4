"""Runs a Hugging Face model and its Megatron conversion side by side, one layer in memory at a
time.

transformers' DeepseekV3 layers with the folder's weights, and K2's own layers with what
``megatron.core.dist_checkpointing`` loads, on the CPU in fp32. Each side goes on from its own
hidden states, so that the last line is the difference of the logits. Where the folder holds a
weight in bf16 or FP8, ours is rounded as it was when it was exported: to bf16, or to e4m3 with the
folder's scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_k2.checkpoint import fp8_blocks
from megatron_k2.checkpoint.hf.arguments import arguments_from_config, rope_scaling, rope_theta
from megatron_k2.checkpoint.hf.model import text_config
from megatron_k2.checkpoint.hf.source import HFSource, open_source
from megatron_k2.checkpoint.names import Region
from megatron_k2.checkpoint.tensors import TensorReader
from megatron_k2.checkpoint.torch_dist import folder as dist_folder

TOLERANCE = 1e-5
"""Of the standard deviation of the values compared, a layer; fp32 sums in another order."""
_ROWS = 8192  # of the vocabulary at a time


def compare(left: Path, right: Path, tokens: int) -> float:
    """Print the difference after every layer; return the largest, in spreads of the values.

    Args:
        left: a Hugging Face folder or a Megatron checkpoint.
        right: the other.
        tokens: of the trial text.
    """
    warnings.simplefilter("ignore")  # upstream's, on Transformer Engine and apex
    hugging_face, megatron = (right, left) if dist_folder.is_checkpoint(left) else (left, right)
    worst = 0.0
    for name, difference in differences(hugging_face, dist_folder.resolve(megatron), tokens):
        tqdm.write(f"  {name:12s} {difference:.1e}")
        worst = max(worst, difference)
    verdict = "within" if worst <= TOLERANCE else "NOT within"
    print(f"largest difference {worst:.1e} of the values' spread, {verdict} {TOLERANCE:.0e}")
    return worst


@torch.no_grad()
def differences(hugging_face: Path, megatron: Path, tokens: int) -> Iterator[tuple[str, float]]:
    """Yield (place, largest difference over the standard deviation) after each layer.

    Args:
        hugging_face: the folder.
        megatron: the folder of one iteration.
        tokens: of a text of random ids.
    """
    source = open_source(hugging_face)
    reader = TensorReader(source)
    config = text_config(source.folder.config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, source.shape.vocab_size, (tokens,), generator=generator)
    embeddings = [reader.rows("model.embed_tokens.weight", i, i + 1, "F32") for i in ids.tolist()]
    load = _Loader(megatron, reader)
    with _SingleProcess():
        theirs = torch.cat(embeddings).unsqueeze(0)
        ours = load(_embedding(config), "embedding.").word_embeddings(ids.unsqueeze(0))
        yield "embedding", _difference(theirs, ours)
        reference = _Reference(config, reader, theirs)
        ours = ours.transpose(0, 1)
        for layer in tqdm(range(source.shape.num_layers), desc="layers", leave=False):
            theirs = reference.layer(layer, theirs)
            ours = _our_layer(config, layer, load)(ours, attention_mask=None)[0]
            yield f"layer {layer}", _difference(theirs, ours.transpose(0, 1))
        theirs = reference.norm(theirs)
        ours = load(_final_norm(config), "decoder.final_layernorm.")(ours)
        yield "final norm", _difference(theirs, ours.transpose(0, 1))
        yield "logits", _logits(reader, load, theirs, ours.transpose(0, 1))
    reader.close()


class _Reference:
    """transformers' layers, one at a time."""

    def __init__(self, config: Any, reader: TensorReader, hidden: Tensor) -> None:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

        fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        fields.pop("quantization_config", None)
        rope: dict[str, Any] = {"rope_type": "default", **(rope_scaling(config) or {})}
        rope.update(rope_type=rope.pop("type", rope["rope_type"]), rope_theta=rope_theta(config))
        fields.pop("rope_scaling", None)
        self.config = DeepseekV3Config(**{**fields, "rope_parameters": rope})
        self.config._attn_implementation = "eager"
        self._theirs, self._reader = theirs, reader
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        self._rotary = theirs.DeepseekV3RotaryEmbedding(self.config)(hidden, positions)
        above = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)
        self._mask = above[None, None]

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """Return the hidden states after a layer."""
        with torch.device("meta"):
            module = self._theirs.DeepseekV3DecoderLayer(self.config, index)
        folder = f"model.layers.{index}."
        state = {name: self._weight(folder, name) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module(hidden, attention_mask=self._mask, position_embeddings=self._rotary)

    def norm(self, hidden: Tensor) -> Tensor:
        """Return the final norm's output."""
        module = self._theirs.DeepseekV3RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        module.weight = torch.nn.Parameter(self._reader.tensor("model.norm.weight", "F32"))
        return module(hidden)

    def _weight(self, folder: str, name: str) -> Tensor:
        """Return a layer's tensor; transformers stacks the experts."""
        if not name.startswith("mlp.experts."):
            return self._reader.tensor(folder + name, "F32")
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        experts = [
            torch.cat(
                [
                    self._reader.tensor(f"{folder}mlp.experts.{expert}.{part}.weight", "F32")
                    for part in parts
                ]
            )
            for expert in range(self.config.n_routed_experts)
        ]
        return torch.stack(experts)


def _our_config(config: Any) -> Any:
    from megatron_k2.model.config import config_from_arguments

    return config_from_arguments(
        arguments_from_config(config) | {"mtp_num_layers": None},
        params_dtype=torch.float32,
        perform_initialization=False,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )


def _our_layer(config: Any, index: int, load: _Loader) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from megatron_k2.model.specs import get_k2_layer_specs

    ours = _our_config(config)
    spec = get_k2_layer_specs(ours).layer_specs[index]
    module = build_module(spec, config=ours, layer_number=index + 1)
    return load(module, f"decoder.layers.{index}.").eval()


def _embedding(config: Any) -> Any:
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )

    ours = _our_config(config)
    return LanguageModelEmbedding(ours, config["vocab_size"], 1, "rope").eval()


def _final_norm(config: Any) -> Any:
    from megatron_k2.model.norm import K2RMSNorm

    ours = _our_config(config)
    return K2RMSNorm(ours, ours.hidden_size, ours.layernorm_epsilon)


class _Loader:
    """Fills modules as Megatron does, from the global tensors under a prefix."""

    def __init__(self, folder: Path, reader: TensorReader) -> None:
        assert isinstance(reader.source, HFSource)
        self._folder, self._reader = str(folder), reader
        self._stored = {name: one.stored for name, one in reader.source.weights.items()}
        self._regions: dict[str, list[Region]] = {}
        for region in reader.source.regions:
            if self._stored[region.name] in ("BF16", "F8_E4M3"):
                self._regions.setdefault(region.key, []).append(region)

    def __call__(self, module: Any, prefix: str) -> Any:
        """Load one module; return it."""
        from megatron.core import dist_checkpointing
        from megatron.core.transformer.utils import sharded_state_dict_default

        metadata = {"singleton_local_shards": False}
        described = sharded_state_dict_default(module, prefix, (), metadata)
        keys = {name: getattr(part, "key", name) for name, part in described.items()}
        loaded = dist_checkpointing.load(described, self._folder)
        own = {
            name.removeprefix(prefix): self._as_exported(keys[name], value)
            for name, value in loaded.items()
            if prefix in name
        }
        module.load_state_dict(own, strict=False)
        return module

    def rows(self, key: str, first: int, last: int, shape: tuple[int, ...]) -> Tensor:
        """Return rows ``[first, last)`` of a global matrix."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        part = torch.empty(last - first, shape[1])
        described = ShardedTensor(
            key, part, part.dtype, tuple(part.shape), shape, (first, 0), None,
            allow_shape_mismatch=True,
        )  # fmt: skip
        loaded = dist_checkpointing.load(
            {"part": described}, self._folder, validate_access_integrity=False
        )
        found: Tensor = loaded["part"]
        return found.bfloat16().float() if key in self._regions else found

    def _as_exported(self, key: str, value: Any) -> Any:
        """Return a whole global tensor as the folder could hold it."""
        for region in self._regions.get(key, ()):
            ends = map(sum, zip(region.offset, region.size, strict=True))
            own = value[tuple(map(slice, region.offset, ends))]
            rounded = own.bfloat16()
            if self._stored[region.name] == "F8_E4M3":
                rounded = self._through_fp8(region.name, rounded.reshape(region.shape))
            own.copy_(rounded.view(own.shape))
        return value

    def _through_fp8(self, name: str, value: Tensor) -> Tensor:
        scales = self._reader.scales(name)
        bits = value.contiguous().view(torch.int16).numpy().view(np.uint16)
        packed, found = np.empty(bits.shape, np.uint8), np.empty_like(bits)
        if fp8_blocks.quantise(bits, scales, packed):
            return value  # what the folder holds is no rounding of it: let the difference show
        fp8_blocks.dequantise(packed, scales, found)
        return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)


def _logits(reader: TensorReader, load: _Loader, theirs: Tensor, ours: Tensor) -> float:
    """Return the logits' largest difference over their spread, by parts of the vocabulary."""
    shape = reader.shape("lm_head.weight")
    worst, squares = 0.0, 0.0
    for first in range(0, shape[0], _ROWS):
        last = min(shape[0], first + _ROWS)
        expected = theirs @ reader.rows("lm_head.weight", first, last, "F32").T
        found = ours @ load.rows("output_layer.weight", first, last, shape).T
        worst = max(worst, (found - expected).abs().max().item())
        squares += expected.square().sum().item()
    return worst / (squares / (theirs.shape[1] * shape[0])) ** 0.5


def _difference(expected: Tensor, found: Tensor) -> float:
    return ((expected - found).abs().max() / expected.std()).item()


class _SingleProcess:
    """A gloo world of one, unless there is a world already."""

    def __enter__(self) -> None:
        import megatron_k2
        from megatron_k2 import parallel

        self._own = not torch.distributed.is_initialized()
        if not self._own:
            return
        megatron_k2.register("cpu")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel.initialize_model_parallel()
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)

    def __exit__(self, *unused: Any) -> None:
        from megatron_k2 import parallel

        if self._own:
            parallel.destroy_model_parallel()
            torch.distributed.destroy_process_group()
