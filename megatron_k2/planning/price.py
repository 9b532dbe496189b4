"""What a traced piece costs on a cluster: seconds, bytes sent, bytes kept, by microbatch.

Optimistic by design (``estimate.py``): a product runs at the GPU's peak or at the speed of its
memory, whichever is slower, a message at its link's rate, and copies of offloaded activations hide
under the work of their piece. All that a candidate of the same sizes needs is here, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.pieces import Piece, Product
from megatron_k2.planning.pipeline import ChunkTimes
from megatron_k2.planning.wire import Message


@dataclass(frozen=True)
class Weights:
    """Numbers of weights of a rank.

    Attributes:
        dense, expert: all.
        trained_dense, trained_expert: those with a gradient.
        trained_ends: of ``trained_dense``, embedding and head, which are AdamW's.
    """

    dense: int = 0
    expert: int = 0
    trained_dense: int = 0
    trained_expert: int = 0
    trained_ends: int = 0

    def __add__(self, other: Weights) -> Weights:
        """Return the weights of both."""
        return Weights(
            self.dense + other.dense, self.expert + other.expert,
            self.trained_dense + other.trained_dense, self.trained_expert + other.trained_expert,
            self.trained_ends + other.trained_ends,
        )  # fmt: skip


@dataclass(frozen=True)
class Price:
    """One microbatch in one piece on one rank of a cluster.

    Attributes:
        kind: of the piece.
        weights: of the piece.
        saved_bytes: kept on the GPU from the forward to the backward pass.
        offloaded_bytes: kept in host memory meanwhile.
        transient_bytes: most that lived beside what is saved.
        times: seconds.
        flops: of the forward pass.
        sent_bytes: by kind of traffic.
    """

    kind: str
    weights: Weights
    saved_bytes: int
    offloaded_bytes: int
    transient_bytes: int
    times: ChunkTimes
    flops: int
    sent_bytes: Mapping[str, float]


def price(piece: Piece, cluster: Cluster, *, fp8: bool = False) -> Price:
    """Return what a piece costs.

    Args:
        piece: with its own sizes.
        cluster: what it runs on.
        fp8: experts compute in FP8.
    """
    return Price(
        kind=piece.kind,
        weights=Weights(
            piece.dense_numel, piece.expert_numel,
            piece.trained_numel[0], piece.trained_numel[1],
            piece.trained_numel[0] if piece.kind in ("embedding", "head") else 0,
        ),
        saved_bytes=piece.saved_bytes,
        offloaded_bytes=piece.offloaded_bytes,
        # Upstream leaves the last layer's tensors where they are and fetches the next ones ahead.
        transient_bytes=piece.transient_bytes + piece.offloaded_bytes,
        times=_times(piece, cluster, fp8=fp8),
        flops=sum(one.flops for one in piece.forward),
        sent_bytes=_sent(piece),
    )  # fmt: skip


class Prices:
    """Prices of the pieces of a candidate, and of chunks made of them.

    Args:
        prices: one of each kind.
    """

    def __init__(self, prices: Iterable[Price]) -> None:
        self._of: dict[tuple[str, ...], Price] = {(one.kind,): one for one in prices}

    def of(self, chunk: tuple[str, ...]) -> Price:
        """Return the price of pieces one after the other."""
        if chunk not in self._of:
            self._of[chunk] = _sum([self._of[kind,] for kind in chunk])
        return self._of[chunk]


def _sum(some: Sequence[Price]) -> Price:
    """Add prices up; the largest transient is that of all."""
    rows = [
        (t.forward, t.backward, t.weight, t.forward_messages, t.backward_messages)
        for t in (one.times for one in some)
    ]
    return Price(
        kind="+".join(one.kind for one in some),
        weights=sum((one.weights for one in some), Weights()),
        saved_bytes=sum(one.saved_bytes for one in some),
        offloaded_bytes=sum(one.offloaded_bytes for one in some),
        transient_bytes=max(one.transient_bytes for one in some),
        times=ChunkTimes(*(sum(column) for column in zip(*rows, strict=True))),
        flops=sum(one.flops for one in some),
        sent_bytes=merge_sent(one.sent_bytes for one in some),
    )


def merge_sent(some: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add bytes up by kind of traffic."""
    found: dict[str, float] = {}
    for sent in some:
        for name, size in sent.items():
            found[name] = found.get(name, 0.0) + size
    return found


def _times(piece: Piece, cluster: Cluster, *, fp8: bool) -> ChunkTimes:
    """Return a piece's seconds; expert messages apart, as a schedule can hide them."""
    rate = cluster.fp8_flops if fp8 and piece.kind == "moe" else cluster.bf16_flops
    ahead, back = (
        product_seconds(some, rate, cluster.memory_bandwidth)
        for some in (piece.forward, piece.backward)
    )
    weight = 0.0
    if piece.trained_numel == (piece.dense_numel, piece.expert_numel):
        # The gradient of a weight is as much work as the product that used it.
        used = [one for one in piece.forward if one.has_weight]
        weight = product_seconds(used, rate, cluster.memory_bandwidth)
    (other_f, expert_f), (other_b, expert_b) = (
        _split(some, cluster) for some in (piece.forward_messages, piece.backward_messages)
    )
    copies = piece.offloaded_bytes / cluster.host_bandwidth  # out, and at the same time back
    wait = max(0.0, copies - (ahead + back)) / 2
    return ChunkTimes(
        ahead + other_f + wait, max(back - weight, 0.0) + other_b + wait, weight, expert_f, expert_b
    )


def product_seconds(products: Sequence[Product], rate: float, bandwidth: float) -> float:
    """Return the least seconds of some products: each at the peak or at the memory's speed."""
    return sum(max(one.flops / rate, one.bytes / bandwidth) for one in products)


def _split(messages: Sequence[Message], cluster: Cluster) -> tuple[float, float]:
    """Return seconds of all other messages, and of the experts' all-to-all."""
    sums = [0.0, 0.0]
    for one in messages:
        sums[one.kind == "all-to-all"] += cluster.seconds(one)
    return sums[0], sums[1]


def _sent(piece: Piece) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in (*piece.forward_messages, *piece.backward_messages):
        name = "experts" if one.kind == "all-to-all" else "tensor and context"
        found[name] = found.get(name, 0.0) + one.sent_bytes
    return found
