"""Episodes that have not begun: their ids and seeds follow from the run's seed and their place."""

from __future__ import annotations

import hashlib

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import TokenLedger
from megatron_k2.gym.base import Task
from megatron_k2.rl.episode import Episode


def seed_of(*parts: object) -> int:
    """Return 63 bits that follow from the parts."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def group_id(task: Task, number: int) -> str:
    """Return a group's id; ``number`` counts the groups of a run."""
    return f"{task.env}/{task.id}#{number}"


def fresh_episode(format: KimiFormat, group: str, index: int, task: Task, run_seed: int) -> Episode:
    """Return an episode that has not begun."""
    seed = seed_of(run_seed, group, index)
    return Episode(f"{group}/{index}", task, seed, TokenLedger(format))
