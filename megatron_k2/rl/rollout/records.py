"""Groups and episodes as lines of JSON: tasks, ledgers, verdicts, number for number."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import NO_VERSION
from megatron_k2.chat.ledger_file import from_json, to_json
from megatron_k2.gym.base import Task, Verdict
from megatron_k2.rl.episode import Episode, Group


@dataclass
class OpenGroup:
    """A group that is not delivered yet.

    Attributes:
        id: of the group.
        number: counts the groups of a run.
        task: of all its episodes.
        episodes: K of them, over or not.
        restarts: how often each was begun anew.
    """

    id: str
    number: int
    task: Task
    episodes: list[Episode]
    restarts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Count no restarts where none are given."""
        self.restarts = self.restarts or [0] * len(self.episodes)

    @property
    def is_complete(self) -> bool:
        """Tell whether all its episodes are over."""
        return all(episode.ending is not None for episode in self.episodes)

    def closed(self) -> Group:
        """Return the group as trainers get it."""
        return Group(self.id, self.task, self.episodes)


def oldest_version(episode: Episode) -> int | None:
    """Return the version of the oldest sampled token; None if there is none."""
    found = (version for version in episode.ledger.versions if version != NO_VERSION)
    return min(found, default=None)


def group_line(group: OpenGroup) -> dict[str, Any]:
    """Return a group without its episodes."""
    return {
        "kind": "group",
        "id": group.id,
        "number": group.number,
        "size": len(group.episodes),
        "task": asdict(group.task),
    }


def episode_line(group: OpenGroup, index: int) -> dict[str, Any]:
    """Return one episode of a group as it is."""
    episode = group.episodes[index]
    return {
        "kind": "episode",
        "group": group.id,
        "index": index,
        "restarts": group.restarts[index],
        "seed": episode.seed,
        "ending": episode.ending,
        "verdict": None if episode.verdict is None else asdict(episode.verdict),
        "components": dict(episode.components),
        "ledger": to_json(episode.ledger) if episode.ledger.ids else None,
    }


def task_from(line: dict[str, Any]) -> Task:
    """Return the task of a group's line."""
    given = dict(line)
    for name in ("messages", "tools", "tags"):
        given[name] = tuple(given[name])
    return Task(**given)


def fill_episode(format: KimiFormat, episode: Episode, line: dict[str, Any]) -> None:
    """Make a fresh episode what its line says.

    Raises:
        ValueError: the ledger is of another template or tokenizer, or not whole.
    """
    episode.seed = line["seed"]
    if line["ledger"] is not None:
        episode.ledger = from_json(format, line["ledger"])
    episode.ending = line["ending"]
    episode.verdict = None if line["verdict"] is None else Verdict(**line["verdict"])
    episode.components = line["components"]
