"""The grid of a scaling law: sparsity x size x tokens x heads x seeds, as runs of a sweep.

Every model has the preset's form at another width and depth (shapes.py); at one size, all
sparsities have the same active experts, the same tokens and so, but for the router's rows, the same
FLOPs (K2R 2.3). Each run has its own schedule, warm-up then linear to zero at its last step.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.planning.scaling.law import Point
from megatron_k2.planning.scaling.shapes import Shape, preset_shape, scaled_shape
from megatron_k2.presets import load_preset
from megatron_k2.training.sweeps.grid import Cell
from megatron_k2.training.sweeps.intervals import Interval, mean_interval

WARMUP_SHARE = 0.1  # of a run's steps; K2's 500 steps are 0.2 % of its own


@dataclass(frozen=True)
class Grid:
    """What is varied and what is not.

    Attributes:
        preset: the form of the models.
        sizes: "HIDDENxLAYERS", or with a rate of its own "HIDDENxLAYERS@LR".
        sparsities: all experts over active ones.
        topk: active experts.
        tokens_per_weight: tokens of a run, over the body's weights (without router, embedding and
            output layer).
        heads_per_layer: heads over layers; empty scales the preset's heads with the width.
        vocab_size: rows of the embedding.
        seq_length: tokens of a sequence.
        batch: sequences of a step.
        flags: of every run.
    """

    preset: str
    sizes: tuple[str, ...]
    sparsities: tuple[int, ...]
    topk: int
    tokens_per_weight: tuple[float, ...]
    heads_per_layer: tuple[float, ...]
    vocab_size: int
    seq_length: int
    batch: int
    flags: tuple[str, ...]

    def cells(self, seeds: Sequence[int]) -> list[Cell]:
        """Return the runs: all settings of the first seed first, small models first.

        Raises:
            ValueError: a size that cannot be read, or numbers out of range.
        """
        self._check()
        return [
            self._cell(size, sparsity, tokens, heads, seed)
            for seed, tokens, size, heads, sparsity in itertools.product(
                seeds,
                self.tokens_per_weight,
                self.sizes,
                self.heads_per_layer or (None,),
                self.sparsities,
            )
        ]

    def shape(self, size: str, sparsity: int, heads_per_layer: float | None) -> Shape:
        """Return the model of one place of the grid."""
        hidden, layers = (int(number) for number in size.partition("@")[0].split("x"))
        return scaled_shape(
            preset_shape(load_preset(self.preset)), layers, hidden, sparsity * self.topk,
            self.topk, self.vocab_size, self.seq_length, heads_per_layer,
        )  # fmt: skip

    def _check(self) -> None:
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(@[\d.eE+-]+)?", size):
                raise ValueError(f"--sizes {size}: wanted HIDDENxLAYERS, for example 64x4")
        if self.topk < 1:
            raise ValueError(f"--topk {self.topk} must be at least 1")
        if min(self.sparsities) < 1:
            raise ValueError(f"--sparsities {min(self.sparsities)} must be at least 1")
        if min(self.tokens_per_weight) <= 0:
            raise ValueError(f"--tokens-per-weight {min(self.tokens_per_weight):g} must be above 0")

    def _cell(self, size: str, sparsity: int, ratio: float, heads: float | None, seed: int) -> Cell:
        shape = self.shape(size, sparsity, heads)
        steps = max(10, round(ratio * shape.body_weights / (self.batch * self.seq_length)))
        tokens = steps * self.batch * self.seq_length
        settings = [("sparsity", str(sparsity)), ("size", size), ("tokens", f"{ratio:g}/weight")]
        settings += [("heads", f"{heads:g}/layer")] if heads is not None else []
        rate = size.partition("@")[2]
        flags = [
            *("--k2-preset", self.preset, *shape.flags()),
            *("--global-batch-size", str(self.batch), "--train-iters", str(steps)),
            *("--min-lr", "0", "--lr-decay-style", "linear"),
            *("--lr-warmup-iters", str(math.ceil(WARMUP_SHARE * steps))),
            *("--log-interval", str(max(1, min(50, steps // 10)))),
            *self.flags,
            *(("--lr", rate) if rate else ()),
        ]
        facts = {
            "flops": tokens * shape.flops_per_token,
            "sparsity": shape.sparsity,
            "size": size,
            "heads": shape.num_attention_heads,
            "tokens": tokens,
            "steps": steps,
            "body_weights": shape.body_weights,
            "active_weights": shape.active_weights,
            "total_weights": shape.total_weights,
        }
        return Cell(tuple(settings), tuple(flags), seed, facts)


@dataclass(frozen=True)
class Measured:
    """A place of the grid over its seeds: settings, facts, and seed -> bits a byte."""

    settings: Mapping[str, str]
    facts: Mapping[str, Any]
    losses: Mapping[int, float]

    @property
    def interval(self) -> Interval:
        """Mean over seeds with its t interval."""
        return mean_interval(list(self.losses.values()))

    @property
    def point(self) -> Point:
        """What the law is fitted to."""
        return Point(self.facts["flops"], self.facts["sparsity"], self.interval.value)


def measured(
    results: Sequence[Mapping[str, Any]], domain: str = "all"
) -> tuple[list[Measured], set[int]]:
    """Return the grid's places over the seeds that all of them have, and the seeds left out.

    Args:
        results: of the runs.
        domain: of the held-out text.

    Raises:
        ValueError: runs of something else, an unknown domain, or no seed that all places have.
    """
    places: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if "flops" not in result["facts"]:
            raise ValueError("--output holds runs of another sweep; give the folder of `run`")
        if domain not in result["bits_per_byte"]:
            known = ", ".join(result["bits_per_byte"])
            raise ValueError(f"--domain {domain} is unknown; the runs have {known}")
        places.setdefault(str(sorted(result["settings"].items())), []).append(result)
    each = [{result["seed"] for result in found} for found in places.values()]
    common = set.intersection(*each)
    if not common:
        raise ValueError("no seed has finished in every place of the grid; go on with `run`")
    kept = [
        Measured(
            found[0]["settings"],
            found[0]["facts"],
            {r["seed"]: r["bits_per_byte"][domain] for r in found if r["seed"] in common},
        )
        for found in places.values()
    ]
    kept.sort(key=lambda place: (place.facts["sparsity"], place.facts["flops"]))
    return kept, set.union(*each) - common
