"""What training reads of a packed row: labels in dialogues, weights, places, orders of epochs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_k2.data.packed_dialogues import _order, lay_out

DIALOGUES = [
    (np.array([5, 6, 7, 8], np.int32), np.array([0, 0, 1, 1], np.uint8)),
    (np.array([9, 10], np.int32), np.array([0, 1], np.uint8)),
    (np.array([1, 2, 3], np.int32), np.array([0, 0, 0], np.uint8)),
]


def test_each_dialogue_predicts_its_own_next_tokens_from_position_0() -> None:
    row = lay_out(DIALOGUES, 10, "token")
    assert row["tokens"].tolist() == [5, 6, 7, 9, 1, 2, 0, 0, 0, 0]
    assert row["labels"].tolist() == [6, 7, 8, 10, 2, 3, 0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 3]
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 6, 10, 10, 10, 10, 10, 10, 10]
    assert int(row["max_seqlen"]) == 4
    full = lay_out(DIALOGUES, 6, "token")
    assert full["cu_seqlens"].tolist() == [0, 3, 4, 6, 6, 6, 6]


def test_every_dialogue_weighs_the_same_where_asked() -> None:
    row = lay_out(DIALOGUES, 8, "dialogue")
    assert row["loss_mask"].tolist() == [0, 0.5, 0.5, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("weighting", ["token", "dialogue"])
def test_what_is_not_learned_has_exactly_no_gradient(weighting: str) -> None:
    row = lay_out(DIALOGUES, 9, weighting)  # type: ignore[arg-type]
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = torch.nn.functional.cross_entropy(logits, row["labels"], reduction="none")
    (losses * row["loss_mask"]).sum().backward()
    assert logits.grad is not None
    is_learned = row["loss_mask"] > 0
    assert torch.equal(logits.grad[~is_learned], torch.zeros_like(logits.grad[~is_learned]))
    assert (logits.grad[is_learned].abs().sum(dim=1) > 0).all()


def test_every_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    orders = [_order(7, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == _order(7, 0, 50).tolist() != _order(8, 0, 50).tolist()
