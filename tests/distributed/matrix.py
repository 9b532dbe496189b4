"""The layouts of the matrix, and the arithmetic that compares a run with the single-process one.

One number a run and quantity: the largest difference from the reference over all steps. The spread
is the largest range, over the steps, of single-process runs that differ in the order of their
microbatches alone, that is in the order of fp32 sums. Eight microbatches a step, because the sum of
a few has hardly an order. Losses are averaged over sequences in the order of their global index, in
fp64; gradient norms by parameter are combined in the order of their names, by upstream's own
formula (a norm of norms, ``core/optimizer/clip_grads.py``), because upstream's total adds the
stages' partial sums in an order that depends on the layout. AdamW runs with epsilon 1e-5: at 1e-8
it turns the rounding of a gradient that is all but zero into a full step, so that one weight's sign
decides whether two runs agree to 1e-6 or to 1e-5 of the norm.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

NUM_SEQUENCES = 8  # of a step, over all data-parallel ranks
NUM_ORDERS = 6  # more runs widen the range, and so the bar, by a quarter: measured up to 9


def microbatch_orders() -> list[tuple[int, ...]]:
    """Return the orders of the runs that make up the spread, the same ones every time."""
    shuffle = random.Random(0).shuffle
    orders = [list(range(NUM_SEQUENCES)) for _ in range(NUM_ORDERS)]
    for order in orders:
        shuffle(order)
    return [tuple(order) for order in orders]


def evidence_apart(names: Iterable[str], heavy: Collection[str]) -> list[Any]:
    """Return names as pytest's parameters; the heavy ones run in `make evidence` only."""
    return [pytest.param(n, marks=[pytest.mark.evidence] if n in heavy else []) for n in names]


SPREADS_ALLOWED = 4.0  # the bar


@dataclass(frozen=True)
class Case:
    """One layout of the matrix."""

    name: str
    world_size: int
    layout: dict[str, Any] = field(default_factory=dict)
    use_distributed_optimizer: bool = False
    bit_for_bit: bool = False
    """Only the place of layers changes, no sum: every digit must stay."""
    micro_batch_size: int = 1
    """Of the same eight sequences a step, and of the single-process run that is compared. Two under
    most tensor parallelism, whose time on gloo is its collectives, some 150 a microbatch."""
    evidence: bool = False
    """Run by `make evidence` only; a wider layout of the matrix contains it."""


def layout_of(tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, **more: Any) -> dict:
    sizes: dict[str, Any] = dict(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, sequence_parallel=tp > 1,
    )  # fmt: skip
    if etp is not None:
        sizes["expert_tensor_parallel_size"] = etp
    return {**sizes, **more}


UNEVEN_PP4 = layout_of(pp=4, pipeline_model_parallel_layout="Ett|t|t|L")
VPP2 = layout_of(pp=2, virtual_pipeline_model_parallel_size=2)
UNEVEN_VPP2 = layout_of(
    pp=2, virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tt|t|L"
)

CASES = (
    Case("PP2", 2, layout_of(pp=2), bit_for_bit=True, evidence=True),
    Case("PP4", 4, layout_of(pp=4), bit_for_bit=True, evidence=True),
    Case("PP4 uneven", 4, UNEVEN_PP4, bit_for_bit=True, evidence=True),
    Case("PP2 x VPP2", 2, VPP2, bit_for_bit=True, evidence=True),
    Case("PP2 x VPP2 uneven", 2, UNEVEN_VPP2, bit_for_bit=True),
    Case("DP2", 2, layout_of(), evidence=True),
    Case("DP2 ZeRO-1", 2, layout_of(), use_distributed_optimizer=True),
    Case("TP2 SP", 2, layout_of(tp=2), micro_batch_size=2, evidence=True),
    Case("EP2", 2, layout_of(ep=2), evidence=True),
    Case("EP4 ZeRO-1", 4, layout_of(ep=4), True, evidence=True),
    Case("TP2 x EP2, ETP1", 2, layout_of(tp=2, ep=2, etp=1), micro_batch_size=2, evidence=True),
    Case("TP2 x EP2, ETP2", 4, layout_of(tp=2, ep=2, etp=2), micro_batch_size=2, evidence=True),
    Case("TP2 x PP2", 4, layout_of(tp=2, pp=2), micro_batch_size=2, evidence=True),
    Case("EP2 x PP2", 4, layout_of(ep=2, pp=2), evidence=True),
    Case(
        "EP2 x PP2 x VPP2 ZeRO-1", 4, {**VPP2, "expert_model_parallel_size": 2}, True, evidence=True
    ),
    Case("TP2 x PP2 x EP2 ZeRO-1", 8, layout_of(tp=2, pp=2, ep=2, etp=1), True, micro_batch_size=2),
    Case("TP2 SP, one sequence at a time", 2, layout_of(tp=2), evidence=True),
)


@dataclass(frozen=True)
class Curve:
    """What is compared of a run: one loss and one gradient norm a step, and digests."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    """Upstream's own total, as its optimizer step returns it."""
    grad_norms_by_name: tuple[float, ...]
    """The same, combined in the order of parameter names; meaningful where parameters are whole."""
    gradient_digests: dict[str, str]
    weight_digests: dict[str, str]


def merge(ranks: list[dict[str, Any]]) -> Curve:
    """Merge the records of a job's ranks into one curve."""
    num_steps = len(ranks[0]["losses"])
    losses, by_name = [], []
    for step in range(num_steps):
        values: dict[int, float] = {}
        norms: dict[str, float] = {}
        for rank in ranks:
            values.update(rank["losses"][step])
            norms.update(rank["parameter_norms"][step])
        losses.append(sum(values[index] for index in sorted(values)) / len(values))
        by_name.append(torch.norm(torch.tensor([norms[name] for name in sorted(norms)])).item())
    digests: dict[str, dict[str, str]] = {"gradient_digests": {}, "weight_digests": {}}
    for rank in ranks:
        for kind, merged in digests.items():
            merged.update(rank.get(kind, {}))
    return Curve(tuple(losses), tuple(ranks[0]["grad_norm"]), tuple(by_name), **digests)


def largest_range(curves: list[tuple[float, ...]]) -> float:
    """Return the largest distance between any two of several runs at the same step."""
    return max(max(values) - min(values) for values in zip(*curves, strict=True))


def largest_difference(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    """Return the largest absolute difference over the steps."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
