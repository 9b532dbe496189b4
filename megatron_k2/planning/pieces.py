"""What one microbatch costs in each piece of a model: embedding, dense layer, MoE layer, head.

One dense and one MoE layer between embedding and head, built by the command's own flags without a
pipeline, run forward and backward by shapes (trace.py); what lives, what was multiplied and what
was sent is read between the pieces. A stage is a sum of pieces: a search adds them up for thousands
of layouts, and what it finds is then built stage by stage. The router is taken to be even.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_k2.planning.dry_run import dry_rank
from megatron_k2.planning.trace import ShapeTrace
from megatron_k2.planning.wire import Message

KINDS = ("embedding", "dense", "moe", "head")


@dataclass(frozen=True)
class Product:
    """A matrix product: its work and what it reads and writes."""

    flops: int
    bytes: int
    has_weight: bool
    """Whether one operand is a weight, not another activation."""


@dataclass(frozen=True)
class Piece:
    """One microbatch in one piece of a model on one rank.

    Attributes:
        kind: of ``KINDS``.
        dense_numel: weights outside the experts.
        expert_numel: weights of this rank's experts.
        trained_numel: of both, those with a gradient.
        matrix_numel: of both, matrices of layers but the router's: what an FP8 release quantises.
        saved_bytes: kept on the GPU from the forward to the backward pass.
        offloaded_bytes: kept in host memory meanwhile.
        transient_bytes: most that lived beside what is saved, in either pass.
        forward: products of the forward pass.
        backward: products of the backward pass, recomputation included.
        forward_messages: of the forward pass.
        backward_messages: of the backward pass.
    """

    kind: str
    dense_numel: int
    expert_numel: int
    trained_numel: tuple[int, int]
    matrix_numel: tuple[int, int]
    saved_bytes: int
    offloaded_bytes: int
    transient_bytes: int
    forward: tuple[Product, ...]
    backward: tuple[Product, ...]
    forward_messages: tuple[Message, ...]
    backward_messages: tuple[Message, ...]


@dataclass
class _Reading:
    """The trace's counters at one moment."""

    live: int
    host: int
    products: int
    messages: int
    peak: int

    @classmethod
    def now(cls, trace: ShapeTrace) -> _Reading:
        live, peak = trace.storages.live_bytes(), trace.storages.peak_bytes
        trace.storages.reset_peak()
        host = trace.host_storages.live_bytes()
        return cls(live, host, len(trace.products), len(trace.messages), peak)


def trace_pieces(
    command: Sequence[str], world_size: int, *, backward: bool = True
) -> dict[str, Piece]:
    """Run one microbatch of each piece.

    Args:
        command: arguments of a training command, its parallel sizes among them; pipeline sizes and
            the number of layers are replaced.
        world_size: of the run; any multiple of what the sizes need will do.
        backward: run the backward pass too; without, nothing is kept for it, as in inference.

    Returns:
        the pieces by kind; a model without experts has no ``moe``, one without a dense layer no
        ``dense``.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    with dry_rank(command, 0, world_size, with_optimizer=False) as (rank, trace):
        (model,) = rank.chunks
        with torch.set_grad_enabled(backward):
            return _run(_unwrapped(model), rank.args, trace)


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _run(model: Any, args: Any, trace: ShapeTrace) -> dict[str, Piece]:
    """Run the model once, with a reading at every border."""
    layers = list(model.decoder.layers)
    kinds = ["embedding", *("moe" if _experts(layer) else "dense" for layer in layers), "head"]
    ahead = [_Reading.now(trace)]
    back: list[_Reading] = []

    def border(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if len(ahead) < len(kinds):  # not a layer that is recomputed
            ahead.append(_Reading.now(trace))
            if hidden.requires_grad:
                hidden.register_hook(lambda _: back.append(_Reading.now(trace)))

    def again(_module: Any, _inputs: Any) -> None:
        if len(ahead) > len(kinds):  # a whole layer recomputed: its pass back begins here
            back.append(_Reading.now(trace))

    hooks = [one.register_forward_hook(border) for one in (model.embedding, *layers)]
    hooks += [layer.register_forward_pre_hook(again) for layer in layers]
    hooks += _mark_attention(layers, trace)
    tokens = torch.zeros(args.micro_batch_size, args.seq_length, dtype=torch.int64)
    tokens = tokens[:, : tokens.shape[1] // args.context_parallel_size]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    loss = model(tokens, positions, None, labels=tokens)
    ahead.append(_Reading.now(trace))
    if torch.is_grad_enabled():
        _forget_gradients(model)
        loss.sum().backward()
        back.append(_Reading.now(trace))
    for hook in hooks:
        hook.remove()
    back = [ahead[-1], *back]
    # What needs no gradient has no border: its backward pass is empty.
    back += [back[-1]] * (len(ahead) - len(back))
    owners = [[model.embedding], *([layer] for layer in layers), [model.decoder.final_layernorm]]
    owners[-1].append(model.output_layer)
    found = {}
    for at, kind in enumerate(kinds):
        found[kind] = _piece(kind, owners[at], ahead, back, at, trace)
    return found


def _mark_attention(layers: Iterable[Any], trace: ShapeTrace) -> list[Any]:
    """Tell the trace that core attention multiplies activations; return the hooks."""

    def mark(of_weights: bool) -> Any:
        return lambda *_: setattr(trace, "of_weights", of_weights)

    inner = [layer.self_attention.core_attention for layer in layers]
    ahead = [one.register_forward_pre_hook(mark(False)) for one in inner]
    return ahead + [one.register_forward_hook(mark(True)) for one in inner]


def _experts(layer: Any) -> bool:
    return hasattr(layer.mlp, "experts")


def _forget_gradients(model: Any) -> None:
    """Free each weight's gradient at once: DDP adds it to its own buffer."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


def _piece(
    kind: str,
    owners: Iterable[Any],
    ahead: Sequence[_Reading],
    back: Sequence[_Reading],
    at: int,
    trace: ShapeTrace,
) -> Piece:
    """Read one piece off the borders: ``ahead`` in order, ``back`` from the head on."""
    first, last = ahead[at], ahead[at + 1]
    turn = len(ahead) - 2 - at
    begin, end = back[turn], back[turn + 1]
    sizes, trained, matrices = [0, 0], [0, 0], [0, 0]
    for name, parameter in (named for owner in owners for named in owner.named_parameters()):
        is_expert = not getattr(parameter, "allreduce", True)
        sizes[is_expert] += parameter.numel()
        trained[is_expert] += parameter.numel() * parameter.requires_grad
        if kind in ("dense", "moe") and parameter.dim() > 1 and "router" not in name:
            matrices[is_expert] += parameter.numel()
    products = [Product(*one) for one in trace.products]
    return Piece(
        kind=kind,
        dense_numel=sizes[0],
        expert_numel=sizes[1],
        trained_numel=(trained[0], trained[1]),
        matrix_numel=(matrices[0], matrices[1]),
        saved_bytes=last.live - first.live,
        offloaded_bytes=last.host - first.host,
        transient_bytes=max(last.peak - last.live, end.peak - begin.live, 0),
        forward=tuple(products[first.products : last.products]),
        backward=tuple(products[begin.products : end.products]),
        forward_messages=tuple(trace.messages[first.messages : last.messages]),
        backward_messages=tuple(trace.messages[begin.messages : end.messages]),
    )
