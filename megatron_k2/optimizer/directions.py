"""From momenta to update directions: the rule, and how equal shapes are batched for it.

Muon's update of a matrix is ``0.2 sqrt(max(rows, columns))`` times its orthogonalised momentum,
whose root mean square is then that of AdamW's usual update, so that both share one learning rate
(Moonlight, arXiv 2502.16982, section 2.2). A matrix and its transpose are the same work and share a
batch. Any callable of the same shape is an update rule (``rules.py``). No process groups, no
Megatron; every matrix whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_k2.optimizer.coefficients import Coefficients, coefficient_schedule
from megatron_k2.optimizer.newton_schulz import (
    Method,
    cheapest_method,
    method_flops,
    newton_schulz,
)

RMS_FACTOR = 0.2
"""Moonlight, equation 4: the usual root mean square of AdamW's updates."""

ScaleMode = Literal["spectral", "unit_rms_norm", "shape_scaling"]

BATCH_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""fp32 bytes of the matrices in one call of the rule. On a CPU its five steps then run in the cache
(1.3 to 1.6 times as fast at 512 x 256); on a GPU fewer and larger launches count. Products and
copies need about three times as much."""


class UpdateRule(Protocol):
    """What turns momenta into update directions, whole matrix by whole matrix."""

    @abstractmethod
    def __call__(self, momenta: Tensor) -> Tensor:
        """Return directions [n, rows, columns] (any floating dtype) for momenta of that shape.

        Rows are at most columns: a taller matrix comes transposed. Momenta are contiguous, in the
        wire's dtype, and may be of one layer or of many. The result for one matrix may depend on
        no other one: that is what makes it the same under every layout.
        """

    @abstractmethod
    def scale(self, rows: int, columns: int) -> float:
        """Return what multiplies the direction, beside the learning rate; rows as stored."""

    @abstractmethod
    def flops(self, rows: int, columns: int) -> float:
        """Return the work of one matrix, which the ranks share evenly."""


@dataclass(frozen=True)
class Orthogonaliser:
    """Muon's rule: how momenta become directions.

    Attributes:
        coefficients: one polynomial a step.
        compute_dtype: of the products.
        method: None for the cheapest accurate one, see ``newton_schulz``.
        rms_factor: root mean square that a full-rank update aims at.
        backend: whose symmetric products; any but ``torch`` implies method ``symmetric``.
        scale_mode: upstream's ``--muon-scale-mode``; ``spectral`` is the reports'.
    """

    coefficients: Sequence[Coefficients] = coefficient_schedule("kimi")
    compute_dtype: torch.dtype = torch.bfloat16
    method: Method | None = None
    rms_factor: float = RMS_FACTOR
    scale_mode: ScaleMode = "spectral"
    backend: str = "torch"

    def __call__(self, momenta: Tensor) -> Tensor:
        """Return the orthogonalised matrices [n, rows, columns], in ``compute_dtype``."""
        return newton_schulz(
            momenta, self.coefficients, self.compute_dtype, self._chosen, self.backend
        )

    @property
    def _chosen(self) -> Method | None:
        return "symmetric" if self.method is None and self.backend != "torch" else self.method

    def scale(self, rows: int, columns: int) -> float:
        """Return the factor of a matrix of so many output rows and input columns."""
        if self.scale_mode == "spectral":
            return self.rms_factor * max(rows, columns) ** 0.5
        if self.scale_mode == "unit_rms_norm":
            return self.rms_factor * (rows / columns) ** 0.5
        return self.rms_factor * max(1.0, rows / columns) ** 0.5

    def flops(self, rows: int, columns: int) -> float:
        """Return the floating-point operations of one matrix's products."""
        method = self._chosen or cheapest_method(
            rows, columns, self.coefficients, self.compute_dtype
        )
        return method_flops(method, rows, columns, len(self.coefficients))


def batches(shapes: Sequence[tuple[int, int, int]], max_batch_bytes: int) -> list[list[int]]:
    """Group entries that can share one call of the rule.

    Args:
        shapes: (how many, rows, columns) of each entry.
        max_batch_bytes: cap of a batch in fp32; a larger entry is a batch of its own.

    Returns:
        positions of the entries of each batch, equal shapes up to transposition, in order.
    """
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, (_, rows, columns) in enumerate(shapes):
        by_shape[min(rows, columns), max(rows, columns)].append(position)
    found = []
    for (rows, columns), positions in by_shape.items():
        part: list[int] = []
        num_bytes = 0
        for position in positions:
            size = 4 * shapes[position][0] * rows * columns
            if part and num_bytes + size > max_batch_bytes:
                found.append(part)
                part, num_bytes = [], 0
            part.append(position)
            num_bytes += size
        found.append(part)
    return found


def directions_of(momenta: Sequence[Tensor], rule: UpdateRule) -> list[Tensor]:
    """Return the directions of one batch.

    Args:
        momenta: [n, rows, columns] each, equal up to transposition; not changed.
        rule: as above.

    Returns:
        the same shapes, in the rule's dtype.

    Raises:
        ValueError: an entry is not a batch of matrices.
    """
    for batch in momenta:
        if batch.ndim != 3:
            raise ValueError(f"momenta are [n, rows, columns], got {tuple(batch.shape)}")
    lying = [batch.transpose(1, 2) if _stands(batch) else batch for batch in momenta]
    # Contiguous, so that no sum's order, and no bit, depends on where the matrices lay.
    result = rule((lying[0] if len(lying) == 1 else torch.cat(lying)).contiguous())
    found = result.split([batch.shape[0] for batch in momenta])
    return [
        piece.transpose(1, 2) if _stands(batch) else piece
        for batch, piece in zip(momenta, found, strict=True)
    ]


def _stands(batch: Tensor) -> bool:
    return batch.shape[1] > batch.shape[2]
