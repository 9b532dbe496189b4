"""From verdicts to rewards: penalty of the token budget and k1.5's length reward.

K2 gives every task a budget of tokens; what is longer is cut and penalised (arXiv 2507.20534,
3.2.3; the size of the penalty is not published). Kimi k1.5's length reward (arXiv 2501.12599,
2.3.3): ``lambda = 0.5 - (len - min) / (max - min)`` within a group; a right answer gets lambda, a
wrong one min(0, lambda), nobody anything where all are equally long; it begins after a warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_k2.gym.base import RIGHT
from megatron_k2.rl.episode import Group
from megatron_k2.rl.run_tables import Rewards

_BROKEN_OFF = ("budget", "context")


def length_rewards(lengths: Sequence[int], right: Sequence[bool]) -> list[float]:
    """Return k1.5's length reward of each response of a group.

    Args:
        lengths: sampled tokens of each.
        right: whether each is right.
    """
    low, high = min(lengths), max(lengths)
    if low == high:
        return [0.0] * len(lengths)
    shares = [0.5 - (length - low) / (high - low) for length in lengths]
    return [one if ok else min(0.0, one) for one, ok in zip(shares, right, strict=True)]


def group_rewards(group: Group, rules: Rewards, step: int) -> list[float]:
    """Return the rewards of a group's judged episodes, in their order; notes their parts.

    Args:
        group: its episodes get ``components``.
        rules: of the run file.
        step: of the run, from 0; the length reward begins at ``length_from_step``.
    """
    episodes = group.judged
    scores = [float(one.verdict.score) for one in episodes]  # type: ignore[union-attr, arg-type]
    wants_length = rules.length_weight > 0 and step >= rules.length_from_step and episodes
    extra = (
        length_rewards([one.num_sampled for one in episodes], [one >= RIGHT for one in scores])
        if wants_length
        else [0.0] * len(episodes)
    )
    found = []
    for episode, score, length in zip(episodes, scores, extra, strict=True):
        over = rules.over_budget_penalty if episode.ending in _BROKEN_OFF else 0.0
        loops = rules.repetition_penalty if episode.ending == "repetition" else 0.0
        parts = {"score": score, "length": rules.length_weight * length, "budget": -over}
        if loops:
            parts["repetition"] = -loops
        episode.components = {**episode.components, **parts}
        found.append(sum(parts.values()))
    return found
