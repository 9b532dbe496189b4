"""What was played, for people: a row an episode, and some of them as text.

``episodes.jsonl`` has one row for each delivered episode, without its tokens; the best and the
worst of a few groups of each batch have their messages too, and stand in ``episodes.txt`` as one
would read them. The groups that are shown are of all environments in turn. A run that goes back to
a checkpoint calls ``rewind``, so that no episode stands there twice.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.chat.ledger import NO_VERSION
from megatron_k2.rl.episode import Episode, Group

ROWS, TEXT = "episodes.jsonl", "episodes.txt"
RULE = "=" * 100
MOST_CHARS = 4000  # of a message; the middle of a longer one is left out


class EpisodeLog:
    """Writes both files.

    Args:
        folder: for them.
        num_shown: groups of a batch whose messages are written.
    """

    def __init__(self, folder: Path, num_shown: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._num_shown = folder, num_shown

    def write(self, step: int, groups: Sequence[Group], rewards: Mapping[str, float]) -> None:
        """Append a batch.

        Args:
            step: of the trainer.
            groups: of the batch.
            rewards: of the judged episodes, by id.
        """
        shown = _in_turn(groups, step)[: self._num_shown]
        extremes = {one.id: one for group in shown for one in _extremes(group, rewards)}
        with open(self._folder / ROWS, "a", encoding="utf-8") as file:
            for group in groups:
                for episode in group.episodes:
                    row = row_of(step, group, episode, rewards.get(episode.id))
                    if episode.id in extremes:
                        row["messages"] = _short(episode.ledger.messages)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        with open(self._folder / TEXT, "a", encoding="utf-8") as file:
            for episode in extremes.values():
                file.write(rendered(step, episode, rewards.get(episode.id)))

    def rewind(self, step: int) -> None:
        """Take out what was written for ``step`` and later ones."""
        self._rewrite(ROWS, lambda text: json.loads(text)["step"] < step, "\n")
        self._rewrite(TEXT, lambda text: int(text.split(" ", 2)[1]) < step, RULE + "\n")

    def _rewrite(self, name: str, wanted: Any, end: str) -> None:
        path = self._folder / name
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        *whole, _ = text.split(end)  # what a kill cut short is left out
        kept = [part for part in whole if part.strip() and wanted(part)]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(part + end for part in kept), encoding="utf-8")
        os.replace(temporary, path)


def row_of(step: int, group: Group, episode: Episode, reward: float | None) -> dict[str, Any]:
    """Return an episode without its tokens."""
    versions = [one for one in episode.ledger.versions if one != NO_VERSION]
    verdict = episode.verdict
    return {
        "step": step,
        "group": group.id,
        "id": episode.id,
        "env": episode.task.env,
        "task": episode.task.id,
        "ending": episode.ending,
        "status": None if verdict is None else verdict.status,
        "score": episode.score,
        "reward": reward,
        "components": {**({} if verdict is None else verdict.components), **episode.components},
        "detail": "" if verdict is None else verdict.detail,
        "tokens": len(versions),
        "turns": sum(span.writer == "engine" for span in episode.ledger.spans),
        "versions": [min(versions), max(versions)] if versions else None,
        "log_prob": sum(episode.ledger.log_probs),
    }


def rendered(step: int, episode: Episode, reward: float | None) -> str:
    """Return an episode as text, its end a rule."""
    verdict = episode.verdict
    lines = [f"step {step} | {episode.id} | {episode.ending} after {episode.num_sampled} tokens"]
    for message in episode.ledger.messages:
        lines.append(f"--- {message['role']}")
        if thought := message.get("reasoning_content"):
            lines.append(f"(thinks) {_cut(str(thought))}")
        if content := message.get("content"):
            lines.append(_cut(str(content)))
        for call in message.get("tool_calls") or ():
            lines.append(f"(calls) {_cut(json.dumps(call['function'], ensure_ascii=False))}")
    if verdict is not None:
        score = "none" if verdict.score is None else f"{verdict.score:g}"
        lines.append(f"--- verdict {verdict.status}, score {score}: {_cut(verdict.detail)}")
    parts = ", ".join(f"{name} {value:g}" for name, value in episode.components.items())
    lines.append(f"--- reward {'none' if reward is None else f'{reward:g}'} ({parts})")
    text = "\n".join(lines).replace(RULE, RULE[:-1] + " ")
    return f"{text}\n{RULE}\n"


def _in_turn(groups: Sequence[Group], step: int) -> list[Group]:
    """Return the groups so that environments take turns; another begins at each step."""
    by_env: dict[str, list[Group]] = {}
    for group in groups:
        by_env.setdefault(group.task.env, []).append(group)
    names = sorted(by_env)
    names = [*names[step % len(names) :], *names[: step % len(names)]] if names else []
    rounds = itertools.zip_longest(*(by_env[name] for name in names))
    return [group for one in rounds for group in one if group is not None]


def _short(value: Any) -> Any:
    """Return messages with long texts cut, as JSON."""
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARS:
        return text
    half = MOST_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - MOST_CHARS} characters ...]\n{text[-half:]}"


def _extremes(group: Group, rewards: Mapping[str, float]) -> list[Episode]:
    """Return the best and the worst episode, or the first where none was judged."""
    judged = [one for one in group.episodes if one.id in rewards]
    if not judged:
        return group.episodes[:1]
    best = max(judged, key=lambda one: rewards[one.id])
    worst = min(judged, key=lambda one: rewards[one.id])
    return [best] if best is worst or rewards[best.id] == rewards[worst.id] else [best, worst]
