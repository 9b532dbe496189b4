"""A line a step for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_k2.rl.outcome import Summary
from megatron_k2.rl.update import Update


def progress_line(
    step: int,
    rolled: Summary,
    updates: Sequence[Update],
    times: Mapping[str, float],
    left_s: float,
) -> str:
    """Return the line of a step.

    Args:
        step: that ended.
        rolled: figures of its rollouts.
        updates: on its batch; the gap is the first one's, the rest the last one's.
        times: ``rollout_s``, ``train_s``, ``sync_s``.
        left_s: of the run, about.
    """
    last = updates[-1]
    return (
        f"step {step:5d} | score {rolled.score:.3f} | reward {rolled.reward:+.3f} | tokens "
        f"{rolled.length:.1f} | loss {last.loss:.3g} | ptx {last.ptx_nats:.3f} | kl "
        f"{last.kl_nats:.2g} | gap {updates[0].gap_nats:.1g} | grad {last.grad_norm:.2g} | "
        f"rollout {times['rollout_s']:.2f} s | train {times['train_s']:.2f} s | sync "
        f"{times['sync_s']:.2f} s | about {left_s / 60:.0f} min left"
    )
