"""The table of episodes and its readable half."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_k2.rl.rollout.episode_log import RULE, EpisodeLog
from tests.unit.rl.rollout.scripted import SeededEngine, rollouts_of, run, task_of


def test_each_episode_has_a_row_and_the_extremes_can_be_read(tmp_path: Path) -> None:
    rollouts = rollouts_of(SeededEngine())
    log = EpisodeLog(tmp_path, num_shown=1)

    async def body() -> None:
        for step in range(3):
            tasks = [task_of(step, "talk"), task_of(9, raises=step == 1)]
            groups = await rollouts.collect(tasks, 0, 1.0)
            scores = {e.id: float(e.score) for g in groups for e in g.judged if e.score is not None}
            log.write(step, groups, scores)
        await rollouts.close()

    run(body)
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert len(rows) == 18 == len({row["id"] for row in rows})
    assert [row["reward"] is None for row in rows].count(True) == 3
    assert {row["status"] for row in rows} == {"ok", "wrong", "error"}
    first = rows[0]
    assert first["tokens"] > 0 and first["turns"] == 3 and first["versions"] == [0, 0]
    told = [row for row in rows if "messages" in row]
    assert {row["step"] for row in told} == {0, 1, 2} and len(told) <= 6
    assert {row["env"] for row in told} == {row["env"] for row in rows}  # they take turns
    assert all(row["messages"][-1]["role"] == "assistant" for row in told)
    text = (tmp_path / "episodes.txt").read_text()
    assert text.count(RULE) == len(told)
    assert "step 0 | talk/t0#0/0 | finished after" in text
    assert "--- user\nsay 0 " in text and "--- verdict ok, score 1" in text

    with open(tmp_path / "episodes.jsonl", "a") as file:
        file.write('{"step": 3, "gro')  # killed
    log.rewind(2)
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 1} and len(rows) == 12
    parts = (tmp_path / "episodes.txt").read_text().split(RULE + "\n")
    assert {part.split(" ")[1] for part in parts if part} == {"0", "1"}
