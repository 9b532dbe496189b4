"""From momenta to Muon's update directions: equal shapes batched, one Newton-Schulz call a batch.

The update of a matrix is ``0.2 sqrt(max(rows, columns))`` times its orthogonalised momentum, whose
root mean square is then that of AdamW's usual update, so that both share one learning rate
(Moonlight, arXiv 2502.16982, section 2.2). A matrix and its transpose are the same work and share a
batch. No process groups, no Megatron; every matrix whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_k2.optimizer.coefficients import Coefficients, coefficient_schedule
from megatron_k2.optimizer.newton_schulz import Method, newton_schulz

RMS_FACTOR = 0.2
"""Moonlight, equation 4: the usual root mean square of AdamW's updates."""

MAX_BATCH_BYTES = 256 << 20
"""fp32 bytes of the matrices in one batch; their products need about three times as much."""


@dataclass(frozen=True)
class Orthogonaliser:
    """How momenta become directions.

    Attributes:
        coefficients: one polynomial a step.
        compute_dtype: of the products.
        method: None for the cheapest accurate one, see ``newton_schulz``.
        rms_factor: root mean square that a full-rank update aims at.
        max_batch_bytes: cap of one batch; a larger matrix is a batch of its own.
    """

    coefficients: Sequence[Coefficients] = coefficient_schedule("kimi")
    compute_dtype: torch.dtype = torch.bfloat16
    method: Method | None = None
    rms_factor: float = RMS_FACTOR
    max_batch_bytes: int = MAX_BATCH_BYTES

    def directions(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """Return the direction of each matrix.

        Args:
            momenta: [n, rows, columns] each, any floating dtype; not changed.

        Returns:
            the same shapes, in ``compute_dtype``.

        Raises:
            ValueError: an entry is not a batch of matrices.
        """
        found: list[Tensor | None] = [None] * len(momenta)
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, batch in enumerate(momenta):
            if batch.ndim != 3:
                raise ValueError(f"momenta are [n, rows, columns], got {tuple(batch.shape)}")
            short, long = sorted(batch.shape[1:])
            by_shape[short, long].append(index)
        for (_, long), indices in by_shape.items():
            for part in self._batches([momenta[index].shape for index in indices]):
                chosen = [indices[position] for position in part]
                lying = [_lying(momenta[index]) for index in chosen]
                matrices = lying[0] if len(lying) == 1 else torch.cat(lying)
                result = newton_schulz(matrices, self.coefficients, self.compute_dtype, self.method)
                result = result.mul_(self.rms_factor * long**0.5)
                sizes = [momenta[index].shape[0] for index in chosen]
                for index, piece in zip(chosen, result.split(sizes), strict=True):
                    standing = momenta[index].shape[1] > momenta[index].shape[2]
                    found[index] = piece.transpose(1, 2) if standing else piece
        return [direction for direction in found if direction is not None]

    def _batches(self, shapes: Sequence[torch.Size]) -> Iterator[list[int]]:
        """Yield positions that fit under the cap together, in order."""
        part: list[int] = []
        num_bytes = 0
        for position, shape in enumerate(shapes):
            size = 4 * shape.numel()
            if part and num_bytes + size > self.max_batch_bytes:
                yield part
                part, num_bytes = [], 0
            part.append(position)
            num_bytes += size
        if part:
            yield part


def _lying(batch: Tensor) -> Tensor:
    """Return the matrices with their long side as columns."""
    return batch.transpose(1, 2) if batch.shape[1] > batch.shape[2] else batch
