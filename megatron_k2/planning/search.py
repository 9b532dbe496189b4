"""Which layouts fit a model on a cluster, and which of them can be fastest.

All layouts that sizes allow are estimated from a few traced pieces (estimate.py); the best that fit
are built for real, stage by stage (finalist.py), and their pieces traced with their own sizes.
Traces depend on tensor and context parallelism and on what happens to activations; expert
parallelism changes only who holds an expert, so that the search rescales it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.estimate import Estimate, estimate
from megatron_k2.planning.finalist import BuiltStage
from megatron_k2.planning.model import Model, Progress, traced_by
from megatron_k2.planning.pieces import Piece
from megatron_k2.planning.price import Prices, price
from megatron_k2.planning.settings import Candidate
from megatron_k2.planning.wire import Message

RESERVE_BYTES = 6e9
"""Left free on a GPU for CUDA's context, NCCL's buffers and fragments. A choice of ours."""


@dataclass(frozen=True)
class Finalist:
    """An estimate with what was built for it.

    Attributes:
        estimate: with pieces of its own sizes.
        command: the flags, complete but for data, tokenizer and length.
        built: its different stages; empty if Megatron refused.
        refusal: Megatron's own words, or "".
    """

    estimate: Estimate
    command: tuple[str, ...]
    built: tuple[BuiltStage, ...]
    refusal: str = ""

    @property
    def peak_bytes(self) -> float:
        """Bytes of the fullest rank: state as built, activations as traced."""
        if not self.built:
            return self.estimate.peak_bytes
        most = 0.0
        for stage in self.built:
            for one in (self.estimate.memory[rank] for rank in stage.stages):
                most = max(most, self.state_bytes(stage) + one.activations + one.transient)
        return most

    def state_bytes(self, stage: BuiltStage) -> float:
        """Return what a rank of a built stage keeps on its GPU between steps."""
        state, moved = stage.state, self.estimate.candidate.optimizer_offload
        main = 0 if moved == "all" else state.main_parameters
        moments = 0 if moved != "none" else state.moments
        return state.parameters + state.gradients + state.buffers + main + moments


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        fitting: layouts that fit, fastest first.
        number: of all layouts.
        nearest: of those that do not fit, the one that needs least memory.
    """

    fitting: list[Estimate]
    number: int
    nearest: Estimate | None


def muon_flops_per_weight(model: Model) -> float:
    """Return Newton-Schulz FLOPs of a weight: of an expert's matrix, which most weights are."""
    from megatron_k2.optimizer.config import MuonClipConfig

    rows = int(model.value("moe_ffn_hidden_size", 0) or model.value("ffn_hidden_size"))
    return MuonClipConfig().update_rule().flops(rows, model.hidden_size) / (
        rows * model.hidden_size
    )


def search(
    model: Model,
    cluster: Cluster,
    candidates: Iterable[Candidate],
    *,
    reserve_bytes: float = RESERVE_BYTES,
    progress: Progress = lambda _: None,
) -> Found:
    """Estimate all candidates."""
    candidates = list(candidates)
    found: list[Estimate] = []
    nearest: tuple[float, Estimate] | None = None
    priced: dict[tuple[Any, ...], Prices] = {}
    work, traced = muon_flops_per_weight(model), _base(model.shape["num_experts"])
    model.trace((replace(one, ep=traced, pp=1, vpp=1) for one in candidates), progress)
    for at, one in enumerate(candidates):
        if at % 200 == 0:
            progress(f"{at} of {len(candidates)} layouts, {len(found)} fit")
        key = traced_by(one)
        if key not in priced:
            traces = model.pieces(replace(one, ep=traced, pp=1, vpp=1))
            pieces = (_with_experts(piece, traced, one) for piece in traces.values())
            priced[key] = _prices(pieces, one, cluster)
        guess = estimate(
            one, priced[key], model.layer_kinds, model.hidden_size, work, cluster, simulated=False
        )
        if fits(guess.peak_bytes, guess.host_bytes, cluster, reserve_bytes):
            found.append(guess)
        elif nearest is None or guess.peak_bytes + guess.host_bytes < nearest[0]:
            nearest = (guess.peak_bytes + guess.host_bytes, guess)
    found.sort(key=lambda each: (each.step_s, each.peak_bytes))
    return Found(found, len(candidates), nearest[1] if nearest else None)


def _prices(pieces: Iterable[Piece], candidate: Candidate, cluster: Cluster) -> Prices:
    return Prices(price(piece, cluster, fp8=candidate.fp8) for piece in pieces)


def fits(peak: float, host: float, cluster: Cluster, reserve_bytes: float) -> bool:
    """Whether a rank's bytes fit its GPU and its share of the host."""
    there = cluster.host_bytes / cluster.node_gpus
    return peak + reserve_bytes <= cluster.memory_bytes and host <= there


TRACED_EXPERTS = 64
"""Expert-parallel ranks of the trace that serves all sizes: few experts a rank trace fastest."""


def _base(num_experts: int) -> int:
    """Return the expert-parallel size that is traced for all others."""
    sizes = [n for n in range(1, TRACED_EXPERTS + 1) if num_experts and num_experts % n == 0]
    return max(sizes, default=1)


def _with_experts(piece: Piece, traced: int, candidate: Candidate) -> Piece:
    """Return a piece as another expert-parallel size would have it."""
    if piece.kind != "moe" or traced == candidate.ep:
        return piece
    ratio = traced / candidate.ep
    ranks = tuple(range(0, candidate.ep * candidate.etp, candidate.etp))

    def moved(one: Message) -> Message:
        if one.kind != "all-to-all":
            return one
        return replace(one, ranks=ranks, own_bytes=one.given_bytes // candidate.ep)

    experts = int(piece.expert_numel * ratio)
    return replace(
        piece,
        expert_numel=experts,
        trained_numel=(piece.trained_numel[0], int(piece.trained_numel[1] * ratio)),
        # Their gradients, in the weights' format, are the largest transient of a MoE layer.
        transient_bytes=max(
            piece.transient_bytes + 2 * int(piece.trained_numel[1] * (ratio - 1)), 0
        ),
        forward_messages=tuple(map(moved, piece.forward_messages)),
        backward_messages=tuple(map(moved, piece.backward_messages)),
    )


def exact_sizes(candidate: Candidate) -> Candidate:
    """Return what is traced for a candidate's own sizes: a pipeline is a sum of pieces."""
    return replace(candidate, pp=1, vpp=1)


def finish(model: Model, cluster: Cluster, guess: Estimate) -> Finalist:
    """Trace a candidate's own pieces and build its stages."""
    candidate = guess.candidate
    command = model.command(candidate)
    try:
        pieces = model.pieces(exact_sizes(candidate))
        prices = _prices(pieces.values(), candidate, cluster)
        exact = estimate(
            candidate, prices, model.layer_kinds, model.hidden_size,
            muon_flops_per_weight(model), cluster,
        )  # fmt: skip
        built = model.build(candidate)
    except ValueError as error:
        return Finalist(guess, tuple(command), (), str(error))
    return Finalist(exact, tuple(command), tuple(built))
