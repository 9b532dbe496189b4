"""Episodes of an RL run to read: the dialogue, its verdict, its reward, and how its group fared.

The run's log keeps the messages of the best and the worst episode of a few groups a step
(``rl/rollout/episode_log.py``). Shown are some of the first step, of the last, and of steps spread
between. Where the policy judged its own answers, the verdict says which answers of the group it
preferred to which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.html_page.dialogue import turns
from megatron_k2.html_page.parts import NONE, Html, table, tag
from megatron_k2.html_page.scale import number, thinned
from megatron_k2.life.report_rl import json_lines
from megatron_k2.rl.rollout.episode_log import ROWS

STEPS, PER_STEP = 12, 4  # of episodes that are shown
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """What the viewer shows.

    Attributes:
        stage: that played it.
        kind: environment, or domain.
        verdict: ``right``, ``wrong``, ``unjudged``, ``kept`` or ``dropped``.
        title: of the entry.
        body: to read.
        step, reward: of an episode that was rewarded; else None.
    """

    stage: str
    kind: str
    verdict: str
    title: str
    body: Sequence[Html]
    step: int | None = None
    reward: float | None = None


def episodes(stage: str, folder: Path) -> list[Shown]:
    """Return episodes of an RL run to read.

    Args:
        stage: its name.
        folder: that holds ``rollouts_*``.
    """
    by_step: defaultdict[int, list[Row]] = defaultdict(list)
    groups: defaultdict[tuple[int, str], list[Row]] = defaultdict(list)
    for path in sorted(folder.glob(f"rollouts_*/{ROWS}")):
        for row in json_lines(path):
            if "messages" in row:
                by_step[row["step"]].append(row)
            groups[row["step"], row["group"]].append({**row, "messages": None})
    return [
        _shown(stage, row, groups[row["step"], row["group"]])
        for step in thinned(sorted(by_step), STEPS)
        for row in _varied(by_step[step])
    ]


def _varied(rows: Iterable[Row]) -> list[Row]:
    """Return a few episodes of a step, of as many environments as there are."""
    found: list[Row] = []
    waiting = list(rows)
    while waiting and len(found) < PER_STEP:
        seen = [one["env"] for one in found]
        best = min(waiting, key=lambda one: seen.count(one["env"]))
        waiting.remove(best)
        found.append(best)
    return found


def _shown(stage: str, row: Row, group: Sequence[Row]) -> Shown:
    env = str(row["env"])
    verdict = {"ok": "right", "wrong": "wrong"}.get(str(row.get("status")), "unjudged")
    title = f"step {row['step']} · {env} · {verdict} · reward {_signed(row.get('reward'))}"
    body = [*turns(row["messages"]), tag("h4", "Verdict"), _verdict(row)]
    if len(group) > 1:
        body += [tag("h4", f"Its group: {len(group)} answers to one prompt"), _group(row, group)]
    reward = row.get("reward")
    return Shown(stage, env, verdict, title, body, row["step"], None if reward is None else reward)


def _verdict(row: Row) -> Html:
    told = {
        "score": _number(row.get("score")),
        "reward": _signed(row.get("reward")),
        "parts": ", ".join(f"{name} {number(y)}" for name, y in _parts(row)) or NONE,
        "why": row.get("detail") or NONE,
        "ended by": f"{row['ending']} after {row['tokens']} tokens in {row['turns']} turns",
        "weights": _versions(row.get("versions")),
        "episode": row["id"],
    }
    return table(("", ""), told.items())


def _parts(row: Row) -> list[tuple[str, float]]:
    named = (row.get("components") or {}).items()
    return [(name, float(y)) for name, y in named if isinstance(y, int | float)]


def _group(row: Row, group: Sequence[Row]) -> Html:
    rows = [
        (
            tag("b", f"{_place(one)}, this one") if one["id"] == row["id"] else _place(one),
            _number(one.get("score")),
            _signed(one.get("reward")),
            one.get("detail") or one["ending"],
        )
        for one in group
    ]
    return table(("answer", "score", "reward", "judged"), rows)


def _place(one: Row) -> str:
    return str(one["id"]).rsplit("/", 1)[-1]


def _number(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else NONE


def _signed(value: Any) -> str:
    return f"{value:+.3f}" if isinstance(value, int | float) else NONE


def _versions(found: Sequence[int] | None) -> str:
    if not found:
        return NONE
    first, last = found
    return f"of step {first}" if first == last else f"of steps {first} to {last}"
