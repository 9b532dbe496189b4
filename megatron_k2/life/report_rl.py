"""Charts of an RL run, from its ``metrics.jsonl``: held-out accuracy, rewards, speed, critic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.html_page.chart import Chart, Line
from megatron_k2.life.report_run import StageRun
from megatron_k2.rl.run_folder import METRICS, flat

Rows = Sequence[Mapping[str, Any]]


def rl_folders(stage: StageRun) -> list[Path]:
    """Return the folders of a stage that hold an RL run: ``--save``, or ``rl`` within it."""
    places = [inside for one in stage.artifacts("episodes") for inside in (one, one / "rl")]
    return [one for one in places if (one / METRICS).is_file()]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``; one that a kill cut short is left out."""
    return list(json_lines(folder / METRICS))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, without what a kill cut short."""
    # A string may hold U+2028, so lines end by \n alone.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def accuracy_charts(stage: str, rows: Rows) -> list[Chart]:
    """Return greedy accuracy on held-out tasks, by environment, with 95 % intervals."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in _kind(rows, "evaluation"):
        for env, one in row["by_env"].items():
            place = (float(row["step"]), one["accuracy"], one["low"], one["high"])
            found.setdefault(env, []).append(place)
    lines = [
        Line(env, [(x, y) for x, y, _, _ in told], [(x, low, up) for x, _, low, up in told], True)
        for env, told in found.items()
    ]
    note = "One greedy answer a task; bands: 95 % (Wilson)."
    title = f"{stage}: accuracy on held-out tasks"
    return [Chart(title, "step", "share right", lines, floor=0.0, note=note)] if lines else []


def reward_charts(stage: str, rows: Rows) -> list[Chart]:
    """Return what was earned in training: reward and score, and by environment."""
    envs = sorted({env for row in _kind(rows, "train") for env in row.get("score_by_env", {})})
    by_env = [_line(rows, f"score_by_env/{env}", env) for env in envs]
    pairs = [_line(rows, "reward", "reward"), _line(rows, "score", "score")]
    charts = [
        Chart(f"{stage}: reward of sampled answers", "step", "mean", pairs, floor=0.0),
        Chart(f"{stage}: score by environment", "step", "mean, 0 to 1", by_env, floor=0.0),
    ]
    return _with_points(charts)


def policy_charts(stage: str, rows: Rows) -> list[Chart]:
    """Return how the policy answers and moves: lengths, entropy, divergence, its engine's gap."""
    charts = [
        _one(stage, rows, "length", "length of an answer", "tokens"),
        _one(stage, rows, "entropy_nats", "entropy of the policy", "nats/token"),
        _one(stage, rows, "kl_nats", "distance from the old policy", "nats/token"),
        _one(stage, rows, "gap_nats", "trainer against engine", "nats/token"),
        _one(stage, rows, "ptx_nats", "loss on PTX text", "nats/token"),
    ]
    return _with_points(charts)


def speed_charts(stage: str, rows: Rows) -> list[Chart]:
    """Return tokens a second of the rollouts, and where a step's time goes."""
    parts = ("rollout", "train", "sync")
    times = [_line(rows, f"{name}_s", name) for name in parts]
    charts = [
        _one(stage, rows, "rollouts/tokens_per_s", "speed of rollouts", "tokens/s"),
        Chart(f"{stage}: time of a step", "step", "s", times, floor=0.0),
    ]
    return _with_points(charts)


def logit_charts(stage: str, rows: Rows) -> list[Chart]:
    """Return the largest attention logit of the updates."""
    return _with_points([_one(stage, rows, "max_logit", "largest attention logit", "")])


def critic_charts(stage: str, rows: Rows) -> list[Chart]:
    """Return how the policy judges: what could be read, position bias, agreement with the watch."""
    asked = [_line(rows, "critic/asked", "asked"), _line(rows, "critic/unparsable", "unreadable")]
    names = {
        "critic/flip_share": "decided by position",
        "critic/first_share": "prefers the first",
        "critic/agreement": "agrees with the frozen judge",
    }
    shares = [_line(rows, path, name) for path, name in names.items()]
    charts = [
        Chart(f"{stage}: comparisons of the critic", "step", "number", asked, floor=0.0),
        Chart(f"{stage}: the critic", "step", "share", shares, floor=0.0),
    ]
    return _with_points(charts)


def _with_points(charts: Sequence[Chart]) -> list[Chart]:
    return [one for one in charts if any(line.points for line in one.lines)]


def _kind(rows: Rows, kind: str) -> Iterator[Mapping[str, Any]]:
    return (row for row in rows if row.get("kind") == kind)


def _line(rows: Rows, path: str, name: str) -> Line:
    steps = ((float(row["step"]), flat(dict(row))) for row in _kind(rows, "train"))
    return Line(name, [(step, figures[path]) for step, figures in steps if path in figures])


def _one(stage: str, rows: Rows, path: str, title: str, unit: str) -> Chart:
    return Chart(f"{stage}: {title}", "step", unit, [_line(rows, path, title)], floor=0.0)
