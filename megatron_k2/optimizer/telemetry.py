"""What MuonClip reports of itself: logits, clipped heads, true update sizes, orthogonality.

A nominal update RMS (0.2) says little: a momentum of low rank moves less, and a polynomial of five
steps leaves singular values between 0.7 and 1.2. On one step in ``interval`` the sums are taken on
the device while the directions pass by; two all-reduces at the end of ``report`` make them figures
of the whole model. Everything else stays silent and costs nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.optimizer.qk_clip import QKClip

live: weakref.ref[Any] | None = None
"""The optimizer built last: the training loop's log has no other way to it."""

KINDS = ("attention", "mlp", "experts", "router")
"""Of matrices, told apart by name."""


def kind_of(name: str) -> str:
    """Return which kind of matrix a parameter holds."""
    if ".router." in name:
        return "router"
    if ".experts." in name:
        return "experts"
    return "attention" if ".self_attention." in name else "mlp"


class Telemetry:
    """Sums over the matrices of one instance in one step.

    Args:
        interval: steps from one measurement to the next; 0 for none.
        device: of the sums.
    """

    def __init__(self, interval: int, device: torch.device) -> None:
        self.interval = interval
        self.active = False
        self._step = 0
        self._due: int | None = None
        # For each kind: squares of the update, its elements, squared residuals, rows.
        self.sums = torch.zeros(len(KINDS), 4, device=device)

    def begin(self, step: int) -> None:
        """Start a step, counted from 1."""
        self._step = step
        if not self.interval:
            return
        if self._due is None:
            self._due = -(-step // self.interval) * self.interval
        self.active = step >= self._due
        if self.active:
            self.sums.zero_()
            self._due = step + self.interval

    def reported(self) -> None:
        """Measure again in so many steps: skipped ones are no steps, but the log counts them."""
        self._due = self._step + self.interval

    def observe(self, name: str, directions: Tensor, scale: float) -> None:
        """Add the directions of matrices [n, rows, columns] of one parameter.

        The update is ``scale`` times the direction; a matrix of zeros has moved nothing, and its
        orthogonality is not counted.
        """
        if not self.active or not directions.numel():
            return
        wide = directions.float()
        lying = wide if wide.shape[1] <= wide.shape[2] else wide.transpose(1, 2)
        squares = lying.square().sum(dim=(1, 2))
        gram = torch.bmm(lying, lying.transpose(1, 2))
        gram.diagonal(dim1=1, dim2=2).sub_(1.0)
        moved = (squares > 0).float()
        row = self.sums[KINDS.index(kind_of(name))]
        row[0] += squares.sum() * scale**2
        row[1] += directions.numel()
        row[2] += (gram.square().sum(dim=(1, 2)) * moved).sum()
        row[3] += moved.sum() * lying.shape[1]


def report(
    telemetries: Sequence[Telemetry],
    clip: QKClip | None,
    layer_numbers: Sequence[int],
    num_layers: int,
    device: torch.device,
) -> dict[str, float]:
    """Return the figures of the last measured step, by TensorBoard tag.

    Args:
        telemetries: of this rank's instances.
        clip: of this rank, if it has layers with attention.
        layer_numbers: from 1, of the rows of the clip's maxima.
        num_layers: of the model, multi-token prediction included.
        device: of the collectives.

    Returns:
        ``k2/update-rms/KIND``, ``k2/orthogonality-residual/KIND`` (root mean square, over rows, of
        the distance of ``X X^T`` from the identity), ``k2/heads-clipped`` and ``k2/heads-broken``
        (shares, over all steps since the last report), ``k2/max-logit/layer-NN``.

    Collective: two all-reduces over the default group - every rank must call.
    """
    sums = torch.zeros(len(KINDS) + 1, 4, device=device)
    for one in telemetries:
        sums[:-1] += one.sums
        one.reported()
    largest = torch.full((num_layers,), -torch.inf, device=device)
    if clip is not None and clip.maxima is not None and clip.counts is not None:
        replicas = dist.get_world_size(clip.group) if clip.group is not None else 1
        sums[-1, :3] = clip.counts / replicas  # every data-parallel rank counts the same heads
        clip.counts = None
        rows = torch.tensor([number - 1 for number in layer_numbers], device=device)
        largest.scatter_(0, rows, clip.maxima.amax(dim=1))
    dist.all_reduce(sums)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    found: dict[str, float] = {}
    for kind, (squares, elements, residual, rows_of) in zip(KINDS, sums.tolist(), strict=False):
        if elements:
            found[f"k2/update-rms/{kind}"] = (squares / elements) ** 0.5
        if rows_of:
            found[f"k2/orthogonality-residual/{kind}"] = (residual / rows_of) ** 0.5
    clipped, broken, total, _ = sums[-1].tolist()
    if total:
        found["k2/heads-clipped"] = clipped / total
        found["k2/heads-broken"] = broken / total
    for number, value in enumerate(largest.tolist(), start=1):
        if value > -float("inf"):
            found[f"k2/max-logit/layer-{number:02}"] = value
    return found
