"""Pieces of a model by shapes: work and memory of each setting, and what must not depend on it."""

from __future__ import annotations

import pytest

from megatron_k2.planning.pieces import Piece, trace_pieces
from megatron_k2.planning.settings import MEMORY

TOKENS, HIDDEN = 256, 256
COMMAND = [
    "--k2-preset=k2-nano", "--bf16", "--num-layers=2", "--moe-layer-freq=[0,1]", "--lr=1e-3",
    "--micro-batch-size=1", "--global-batch-size=16", "--train-iters=1", f"--seq-length={TOKENS}",
    "--min-offloaded-tensor-size=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def pieces() -> dict[str, dict[str, Piece]]:
    """Return the pieces of every memory setting."""
    return {name: trace_pieces([*COMMAND, *flags], 1) for name, flags in MEMORY.items()}


def flops(piece: Piece) -> tuple[int, int]:
    """Return (forward, backward)."""
    return sum(p.flops for p in piece.forward), sum(p.flops for p in piece.backward)


def test_a_backward_pass_is_twice_the_forward_and_what_is_recomputed(
    pieces: dict[str, dict[str, Piece]],
) -> None:
    for kind in ("dense", "moe"):
        forward, backward = flops(pieces["keep"][kind])
        assert backward == 2 * forward > 0
        for name in ("recompute", "compact", "report"):
            again = flops(pieces[name][kind])
            assert again[0] == forward and 2 * forward < again[1] < 2.2 * forward
        assert flops(pieces["full"][kind]) == (forward, 3 * forward)
    assert all(flops(one["head"]) == flops(pieces["keep"]["head"]) for one in pieces.values())


def test_each_setting_keeps_less_and_whole_recomputation_only_the_input(
    pieces: dict[str, dict[str, Piece]],
) -> None:
    for kind in ("dense", "moe"):
        saved = [
            pieces[name][kind].saved_bytes for name in ("keep", "recompute", "compact", "full")
        ]
        assert saved == sorted(saved, reverse=True) and len(set(saved)) == 4
        here, moved = pieces["compact"][kind].saved_bytes, pieces["report"][kind]
        # A tensor that two modules save goes to the host twice: upstream's groups are by module.
        assert moved.saved_bytes < 0.6 * here and moved.offloaded_bytes >= here - moved.saved_bytes
        assert not pieces["compact"][kind].offloaded_bytes
    assert pieces["full"]["dense"].saved_bytes == 2 * TOKENS * HIDDEN


@pytest.mark.evidence  # 8 s of pricing
def test_experts_spread_over_ranks_are_fewer_here_and_as_much_work() -> None:
    alone, two, four = (
        trace_pieces([*COMMAND, *MEMORY["keep"], f"--expert-model-parallel-size={ranks}"], ranks)[
            "moe"
        ]
        for ranks in (1, 2, 4)
    )
    assert two.expert_numel == 2 * four.expert_numel and two.dense_numel == four.dense_numel
    # On one rank Megatron files experts among the dense weights.
    assert alone.dense_numel == two.dense_numel + 2 * two.expert_numel
    assert flops(alone) == flops(two) == flops(four)
    rows = TOKENS * 4  # of bf16 there and back, with their fp32 probabilities there
    for piece, share in ((two, 1 / 2), (four, 3 / 4)):
        sent = [m.sent_bytes for m in piece.forward_messages if m.kind == "all-to-all"]
        assert sum(sent) == share * rows * (2 * 2 * HIDDEN + 4)
    assert not [m for m in alone.forward_messages if len(m.ranks) > 1]
