"""From groups on each leader to samples on every rank.

A leader has its groups' ledgers; all ranks need the same batch. What travels is small: ids,
log-probabilities, chosen experts and rewards as arrays. Advantages are taken after the exchange, so
that a shuffled control can move rewards over the whole batch, and each is of its own group.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_k2.rl.episode import Group
from megatron_k2.rl.rewards import group_rewards
from megatron_k2.rl.rows import Sample, sample_from
from megatron_k2.rl.run_tables import Rewards


@dataclass(frozen=True)
class GroupOutcome:
    """A group without its ledgers.

    Attributes:
        place: among the step's groups.
        id, task, env: of the group.
        samples: judged episodes, without advantages.
        rewards, scores: of each sample.
        endings: of all episodes.
        num_unjudged: episodes that are left out.
        lengths: sampled tokens of each judged episode.
    """

    place: int
    id: str
    task: str
    env: str
    samples: tuple[Sample, ...]
    rewards: tuple[float, ...]
    scores: tuple[float, ...]
    endings: tuple[str, ...]
    num_unjudged: int
    lengths: tuple[int, ...]


def outcome_of(group: Group, place: int, version: int, rules: Rewards, step: int) -> GroupOutcome:
    """Return the outcome of a group."""
    judged = group.judged
    return GroupOutcome(
        place,
        group.id,
        group.task.id,
        group.task.env,
        tuple(sample_from(one.ledger.row(), version, 0.0, 0.0) for one in judged),
        tuple(group_rewards(group, rules, step)),
        tuple(float(one.score or 0.0) for one in judged),
        tuple(str(one.ending) for one in group.episodes),
        len(group.episodes) - len(judged),
        tuple(one.num_sampled for one in judged),
    )


def rewards_by_id(groups: Sequence[Group], outcomes: Sequence[GroupOutcome]) -> dict[str, float]:
    """Return the reward of each judged episode, by its id."""
    return {
        episode.id: reward
        for group, outcome in zip(groups, outcomes, strict=True)
        for episode, reward in zip(group.judged, outcome.rewards, strict=True)
    }


def gathered(own: Sequence[GroupOutcome]) -> list[GroupOutcome]:
    """Return all leaders' outcomes, in the order of the step's groups.

    Collective: all-gather over all ranks; those that lead no engine give nothing.
    """
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, list(own))
    return sorted((one for part in parts for one in part), key=lambda one: one.place)


def shuffled(outcomes: Sequence[GroupOutcome], seed: int, step: int) -> list[GroupOutcome]:
    """Return the outcomes with rewards moved over the whole batch: the control of a run."""
    rewards = [reward for one in outcomes for reward in one.rewards]
    mixed = list(np.random.default_rng((seed, step)).permutation(rewards))
    found = []
    for one in outcomes:
        count = len(one.rewards)
        own, mixed = mixed[:count], mixed[count:]
        found.append(dataclasses.replace(one, rewards=tuple(map(float, own))))
    return found


def trained_samples(outcomes: Sequence[GroupOutcome], even: bool = True) -> list[Sample]:
    """Return the samples of the loss, with advantages and weights.

    Groups in which every reward is the same have an advantage of zero and still hold the policy to
    its old self, as the objective says; without ``even`` they are left out, unless all groups are
    like that, and count in the others' weights all the same. A group without a judged episode is
    left out; the weight of the others makes the loss a mean over groups of means over responses.
    """
    counted = [one for one in outcomes if one.samples]
    trained = counted if even else [one for one in counted if len(set(one.rewards)) > 1]
    found = []
    for one in trained or counted:
        mean = sum(one.rewards) / len(one.rewards)
        weight = 1.0 / (len(counted) * len(one.samples))
        found += [
            dataclasses.replace(sample, advantage=reward - mean, weight=weight)
            for sample, reward in zip(one.samples, one.rewards, strict=True)
        ]
    return found


@dataclass(frozen=True)
class Summary:
    """Figures of a batch of rollouts; means are over judged episodes."""

    reward: float
    score: float
    length: float
    num_groups: int
    num_unjudged: int
    num_even_groups: int
    endings: dict[str, int] = field(default_factory=dict)
    score_by_env: dict[str, float] = field(default_factory=dict)


def summary(outcomes: Sequence[GroupOutcome]) -> Summary:
    """Return the figures; ``num_even_groups`` have one reward for all, so no gradient of it."""
    scores = [score for one in outcomes for score in one.scores]
    by_env: dict[str, list[float]] = {}
    for one in outcomes:
        by_env.setdefault(one.env, []).extend(one.scores)
    return Summary(
        _mean([reward for one in outcomes for reward in one.rewards]),
        _mean(scores),
        _mean([float(length) for one in outcomes for length in one.lengths]),
        len(outcomes),
        sum(one.num_unjudged for one in outcomes),
        sum(len(set(one.rewards)) < 2 for one in outcomes),
        dict(Counter(ending for one in outcomes for ending in one.endings)),
        {env: _mean(values) for env, values in sorted(by_env.items()) if values},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
