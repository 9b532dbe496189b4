"""One table: the name of every tensor on the Hugging Face side and its place on Megatron's.

Every Hugging Face tensor is one rectangle of one global tensor of a ``torch_dist`` checkpoint: an
expert's gate is the first half of row block e of ``experts.experts.linear_fc1.weight``, whose
global shape is [experts, 2 moe_ffn, hidden]. Nothing is permuted: Megatron's MLA de-interleaves
the rotary part when it runs. Names on Megatron's side are those of Transformer Engine's modules,
which fuse three norms into the linear after them; the local layers write the same (model/specs.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_k2.checkpoint.hf.model import ModelShape


@dataclass(frozen=True)
class Row:
    """One line of the table: a Hugging Face tensor and the tensor of Megatron's that holds it.

    Attributes:
        megatron: name below its layer; at the top, whole.
        hugging_face: name below its layer; ``{expert}`` runs.
        shape: of the Hugging Face tensor, as symbols of ``ModelShape.sizes``.
        part: (index, count) of tensors stacked along the first axis: gate, then up.
        fp32: Megatron keeps it in fp32, whatever the other weights are.
    """

    megatron: str
    hugging_face: str
    shape: tuple[str, ...]
    part: tuple[int, int] = (0, 1)
    fp32: bool = False


@dataclass(frozen=True)
class Region:
    """A Hugging Face tensor and its rectangle ``[offset, offset + size)`` of a global tensor.

    Attributes:
        name, shape: of the Hugging Face tensor, whole.
        key, global_shape: of Megatron's tensor, whole: over all ranks, experts on the first axis.
        offset, size: of the rectangle; as many axes as ``global_shape``.
        fp32: Megatron keeps it in fp32.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    fp32: bool


TOP = (
    Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
    Row("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    Row("output_layer.weight", "lm_head.weight", ("vocab", "hidden")),
)
_ATTENTION = (
    Row("input_layernorm.weight", "input_layernorm.weight", ("hidden",)),
    Row(
        "self_attention.linear_kv_down_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        ("kv latent + rope", "hidden"),
    ),
    Row(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attn.kv_a_layernorm.weight",
        ("kv latent",),
    ),
    Row(
        "self_attention.linear_kv_up_proj.weight",
        "self_attn.kv_b_proj.weight",
        ("kv", "kv latent"),
    ),
    Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "v")),
)
_QUERY_LATENT = (
    Row(
        "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_proj.weight",
        ("q latent", "hidden"),
    ),
    Row(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attn.q_a_layernorm.weight",
        ("q latent",),
    ),
    Row("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", ("q", "q latent")),
)
_QUERY = (Row("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", ("q", "hidden")),)
_DENSE = (
    Row("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", ("hidden",)),
    Row("mlp.linear_fc1.weight", "mlp.gate_proj.weight", ("ffn", "hidden"), (0, 2)),
    Row("mlp.linear_fc1.weight", "mlp.up_proj.weight", ("ffn", "hidden"), (1, 2)),
    Row("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("hidden", "ffn")),
)
_MOE = (
    Row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("hidden",)),
    Row("mlp.router.weight", "mlp.gate.weight", ("experts", "hidden")),
    Row("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", ("experts",), fp32=True),
)
_SHARED = (
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.gate_proj.weight",
        ("shared ffn", "hidden"),
        (0, 2),
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.up_proj.weight",
        ("shared ffn", "hidden"),
        (1, 2),
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_experts.down_proj.weight",
        ("hidden", "shared ffn"),
    ),
)
_EXPERT = (
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.{expert}.gate_proj.weight",
        ("moe ffn", "hidden"),
        (0, 2),
    ),
    Row(
        "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.{expert}.up_proj.weight",
        ("moe ffn", "hidden"),
        (1, 2),
    ),
    Row(
        "mlp.experts.experts.linear_fc2.weight",
        "mlp.experts.{expert}.down_proj.weight",
        ("hidden", "moe ffn"),
    ),
)
_MTP = (
    Row("enorm.weight", "enorm.weight", ("hidden",)),
    Row("hnorm.weight", "hnorm.weight", ("hidden",)),
    Row("eh_proj.weight", "eh_proj.weight", ("hidden", "2 hidden")),
    Row("final_layernorm.weight", "shared_head.norm.weight", ("hidden",)),
)
_SHARED_BY_MTP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
"""Tensors that a multi-token-prediction layer's file repeats; Megatron shares the main ones."""

IGNORED_SUFFIX = ".self_attn.rotary_emb.inv_freq"
"""A buffer that some releases saved; it follows from the configuration."""


def regions(shape: ModelShape) -> Iterator[Region]:
    """Yield the region of every tensor of a model, layer by layer."""
    yield from (_region(row, shape, "", "") for row in TOP)
    for layer in range(shape.num_layers + shape.mtp_num_layers):
        depth = layer - shape.num_layers
        if depth < 0:
            key = f"decoder.layers.{layer}."
        else:
            outer = f"mtp.layers.{depth}."
            yield from (_region(row, shape, outer, f"model.layers.{layer}.") for row in _MTP)
            key = f"{outer}transformer_layer."
        yield from _layer(shape, key, f"model.layers.{layer}.", layer < shape.num_dense_layers)


def repeated(shape: ModelShape) -> dict[str, str]:
    """Return the names of tensors that repeat another, and which; a file may leave them out."""
    layers = range(shape.num_layers, shape.num_layers + shape.mtp_num_layers)
    return {
        f"model.layers.{layer}.{name}": source
        for layer in layers
        for name, source in _SHARED_BY_MTP.items()
    }


def extra_state_keys(shape: ModelShape) -> Iterator[str]:
    """Yield the keys of the objects that every linear of a model asks for beside its weight.

    Transformer Engine keeps FP8 scaling there; in a converted checkpoint they are empty. Its core
    attention asks for one too.
    """
    for layer in range(shape.num_layers + shape.mtp_num_layers):
        depth = layer - shape.num_layers
        key = f"decoder.layers.{layer}."
        if depth >= 0:
            yield f"mtp.layers.{depth}.eh_proj._extra_state/shard_0_1"
            key = f"mtp.layers.{depth}.transformer_layer."
        is_dense = layer < shape.num_dense_layers
        rows = [*_attention(shape), *(_DENSE if is_dense else _shared(shape))]
        linears = {row.megatron.rpartition(".")[0] for row in rows if "linear_" in row.megatron}
        for linear in sorted(linears | {"self_attention.core_attention"}):
            yield f"{key}{linear}._extra_state/shard_0_1"
        for linear in () if is_dense else ("linear_fc1", "linear_fc2"):
            for expert in range(shape.num_experts):
                place = f"shard_{expert}_{shape.num_experts}"
                yield f"{key}mlp.experts.experts.{linear}._extra_state/{place}"


def _layer(shape: ModelShape, key: str, folder: str, is_dense: bool) -> Iterator[Region]:
    own = _DENSE if is_dense else (*_MOE, *_shared(shape))
    yield from (_region(row, shape, key, folder) for row in (*_attention(shape), *own))
    for expert in range(0 if is_dense else shape.num_experts):
        yield from (_region(row, shape, key, folder, expert) for row in _EXPERT)


def _attention(shape: ModelShape) -> tuple[Row, ...]:
    return (*_ATTENTION, *(_QUERY if shape.q_lora_rank is None else _QUERY_LATENT))


def _shared(shape: ModelShape) -> tuple[Row, ...]:
    return _SHARED if shape.moe_shared_expert_intermediate_size else ()


def _region(
    row: Row, shape: ModelShape, key: str, folder: str, expert: int | None = None
) -> Region:
    """Return one row's region; an expert's tensors have a leading axis of experts."""
    size = tuple(shape.sizes[symbol] for symbol in row.shape)
    index, count = row.part
    offset = (index * size[0], *(0 for _ in size[1:]))
    whole = (count * size[0], *size[1:])
    name = folder + row.hugging_face.format(expert=expert)
    if expert is None:
        return Region(name, size, key + row.megatron, whole, offset, size, row.fp32)
    stacked = (shape.num_experts, *whole)
    return Region(name, size, key + row.megatron, stacked, (expert, *offset), (1, *size), row.fp32)
