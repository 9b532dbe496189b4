"""The loss of one global batch, microbatch by microbatch, through Megatron's schedules.

A batch is the same list of rows on every rank; a data-parallel rank trains its share. A sequence's
log-probability is the sum over its sampled tokens: on a context-parallel rank a part of it, summed
over the group before it is squared; over tensor parallelism the loss of a token is whole already.
Weights make the sum over all rows the loss itself, so Megatron divides by one token in all.

Behaviour log-probabilities are the engine's. At a batch's first update the trainer's own are
measured beside them: their difference a token is the gap, and where the weights are corrected the
log-ratio starts from the trainer's, so that it is exactly 0 there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_k2.rl.objective import importance_weights, losses, segment_sums
from megatron_k2.rl.routes import replay
from megatron_k2.rl.rows import Row, Sample, empty_row
from megatron_k2.rl.run_tables import Objective

Report = dict[str, Tensor]
REPORTED = (
    *("loss", "objective", "ptx", "weight", "gap", "gap_tokens"),
    *("kl", "tokens", "entropy"),
)


@dataclass
class Batch:
    """One global batch; the same on every rank.

    Attributes:
        samples: episodes.
        rows: of episodes and of PTX text, padded to a multiple of the data-parallel size.
        seq_length: of every row.
        ptx_weight: of the mean PTX loss a token.
        reference: log-probability of each episode in the trainer when the batch's first update
            began; filled by it, for the episodes of this rank.
    """

    samples: Sequence[Sample]
    rows: list[Row]
    seq_length: int
    ptx_weight: float = 0.0
    reference: dict[int, float] = field(default_factory=dict)

    @property
    def num_ptx_tokens(self) -> int:
        """Learned tokens of the PTX rows."""
        return int(sum(row.mask.sum() for row in self.rows if row.is_ptx))


def make_batch(
    samples: Sequence[Sample],
    episode_rows: Sequence[Row],
    ptx_rows: Sequence[Row],
    seq_length: int,
    dp_size: int,
    ptx_weight: float,
) -> Batch:
    """Return the batch; rows alternate over ranks, so PTX and padding spread."""
    rows = [*episode_rows, *ptx_rows]
    missing = -len(rows) % dp_size
    rows += [empty_row(seq_length) for _ in range(missing)]
    return Batch(samples, rows, seq_length, ptx_weight)


def rows_of_rank(batch: Batch, dp_rank: int, dp_size: int) -> Iterator[tuple[int, Row]]:
    """Yield this data-parallel rank's rows and their numbers."""
    for number in range(dp_rank, len(batch.rows), dp_size):
        yield number, batch.rows[number]


class ForwardStep:
    """Megatron's ``forward_step_func`` for one update on one batch.

    Args:
        batch: to train.
        rules: of the run file.
        update: number of the update on this batch, from 0.
        groups: ``cp`` and ``tp`` process groups, ``dp`` for places.
    """

    def __init__(self, batch: Batch, rules: Objective, update: int, groups: Any) -> None:
        self._batch, self._rules, self._update, self._groups = batch, rules, update, groups
        self._counts = groups.dp.rank() == 0 and groups.cp.rank() == 0
        self._num_ptx_tokens = max(1, batch.num_ptx_tokens)

    def __call__(self, rows: Iterator[tuple[int, Row]], model: Any) -> tuple[Tensor, Any]:
        """Run one microbatch; return per-token losses [1, s / cp] and the loss function."""
        number, row = next(rows)
        device = next(model.parameters()).device
        tensors, packed = on_this_rank(row, self._groups, device)
        routes = tensors.pop("routes", None)
        replay(model, routes if self._rules.replay_routing else None, self._groups.tp)
        output = model(
            tensors["tokens"],
            tensors["position_ids"],
            None,
            labels=tensors["labels"],
            loss_mask=tensors["mask"],
            packed_seq_params=packed,
        )
        return output, partial(self._loss, row, tensors, number == 0)

    def _loss(
        self, row: Row, tensors: dict[str, Tensor], is_first: bool, output: Tensor
    ) -> tuple[Tensor, Tensor, Report]:
        """Return this row's part of the loss, its count for Megatron, and what to report."""
        log_probs = -output.view(-1).float() * tensors["mask"].view(-1)
        if row.is_ptx:
            part = -log_probs.sum() / self._num_ptx_tokens
            report = {"ptx": part.detach()}
            loss = part * self._batch.ptx_weight
        else:
            loss, report = self._episodes(row, tensors, log_probs)
        count = torch.tensor(int(is_first and self._counts), dtype=torch.int, device=loss.device)
        report["loss"] = loss.detach() if row.is_ptx else loss.detach() / self._groups.cp.size()
        return loss, count, self._reported(report, count)

    def _episodes(
        self, row: Row, tensors: dict[str, Tensor], log_probs: Tensor
    ) -> tuple[Tensor, Report]:
        if not row.members:
            return log_probs.sum() * 0.0, {}
        members = torch.tensor(row.members, device=log_probs.device)
        places = tensors["episodes"].view(-1)
        local = torch.where(places < 0, places, torch.searchsorted(members, places.clamp(min=0)))
        count, cp = len(row.members), self._groups.cp
        behaviour = tensors["behaviour"].view(-1)
        now = reduced(segment_sums(log_probs, local, count), cp)
        engine = reduced(segment_sums(behaviour, local, count), cp)
        if self._update == 0:
            for member, value in zip(row.members, now.tolist(), strict=True):
                self._batch.reference[member] = value
        own = now.new_tensor([self._batch.reference[member] for member in row.members])
        corrects = self._rules.correction != "none"
        weights = importance_weights(
            own - engine, self._rules.correction, self._rules.correction_cap
        )
        ratios = now - (own if corrects else engine)
        samples = [self._batch.samples[member] for member in row.members]
        advantage = now.new_tensor([one.advantage for one in samples])
        share = now.new_tensor([one.weight for one in samples])
        per_episode = losses(ratios, advantage, self._rules.tau, self._rules.form)
        loss = (per_episode * weights * share).sum()
        copies = self._groups.cp.size()  # every context-parallel rank reports the same sum
        report = {
            "objective": loss.detach() / copies,
            "weight": (weights * share).sum() / copies,
        }
        return loss, report | self._token_report(tensors, log_probs.detach(), behaviour)

    def _token_report(
        self, tensors: dict[str, Tensor], log_probs: Tensor, behaviour: Tensor
    ) -> Report:
        """Return sums over this rank's sampled tokens; of the gap, those of current weights."""
        mask = tensors["mask"].view(-1)
        difference = (log_probs - behaviour) * mask
        current = tensors["is_current"].view(-1).float() * mask
        return {
            "gap": (difference.abs() * current).sum(),
            "gap_tokens": current.sum(),
            # k3 of Schulman: unbiased for KL(old, new) on tokens sampled from old, never negative.
            "kl": ((difference.exp() - 1 - difference) * mask).sum(),
            "tokens": mask.sum(),
            "entropy": -(behaviour * mask).sum(),
        }

    def _reported(self, report: Report, count: Tensor) -> Report:
        """Return what Megatron sums over rows and ranks, and divides by the one count in all."""
        zero = count.float() * 0
        values = {name: report.get(name, zero).detach().float() for name in REPORTED}
        return {name: torch.stack([value, count.float()]) for name, value in values.items()}


def on_this_rank(row: Row, groups: Any, device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Return a row's tensors [1, s / cp, ...] of this context-parallel rank, and its packing."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import get_batch_on_this_cp_rank

    arrays = {
        "tokens": row.tokens,
        "labels": row.labels,
        "position_ids": row.positions,
        "mask": row.mask,
        "episodes": row.episodes,
        "behaviour": row.behaviour,
        "is_current": row.is_current,
    }
    if row.routes is not None:
        arrays["routes"] = row.routes
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array)[None].to(device) for name, array in arrays.items()
    }
    tensors["cu_seqlens"] = torch.tensor(row.bounds, dtype=torch.int32, device=device)
    tensors = get_batch_on_this_cp_rank(
        tensors, is_hybrid_cp=False, cp_group=groups.cp, use_per_sequence_balancing=True
    )
    places = tensors.pop("cu_seqlens")
    longest = int(np.diff(row.bounds).max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=places,
        cu_seqlens_kv=places,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=len(row.tokens),
    )
    return tensors, packed


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the identity: every rank computes the same loss of the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def reduced(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over a context-parallel group. Collective: every rank of it must call."""
    if group.size() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values, group)
    return total
