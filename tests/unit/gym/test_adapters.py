import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_k2.gym.adapters import nemo_rows, verl_rows
from megatron_k2.gym.adapters.gymnasium import GymnasiumEnvironment
from megatron_k2.gym.base import Answer, Task
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}},
}
CALL = {"id": "look:0", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TASK = Task(
    id="t1",
    env="mathematics",
    messages=(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "look:0", "content": "4"},
        {"role": "user", "content": "So?"},
    ),
    metadata={"answer": "4", "nested": {"rows": [[1, 2], []]}},
    tools=(TOOL,),
    tags=("domain:mathematics", "difficulty:1"),
    budget=99,
)


def test_our_tasks_come_back_from_verl_rows_as_they_were() -> None:
    row = verl_rows.to_row(TASK, "train", 3)
    assert tuple(row) == verl_rows.FIELDS
    assert row["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert verl_rows.from_row(json.loads(json.dumps(row))) == TASK


def test_verl_rows_come_back_from_parquet(tmp_path: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    other = Task("t2", "reasoning", ({"role": "user", "content": "?"},), {"answer": "x", "a": 1})
    rows = [verl_rows.to_row(task) for task in (TASK, other)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [verl_rows.from_row(row) for row in found] == [TASK, other]


def test_a_foreign_verl_row_is_a_task() -> None:
    row = {  # as verl's examples/data_preprocess/gsm8k.py makes it
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "How many?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 5, "answer": "...", "question": "..."},
    }
    task = verl_rows.from_row(row, env="mathematics")
    assert task.env == "mathematics" and task.metadata["answer"] == "72"
    assert task.id == "openai/gsm8k/train-5"
    with pytest.raises(ValueError, match="reward_model missing"):
        verl_rows.from_row({key: value for key, value in row.items() if key != "reward_model"})


def test_our_tasks_come_back_from_nemo_rows_as_they_were() -> None:
    row = json.loads(json.dumps(nemo_rows.to_row(TASK)))
    params = row["responses_create_params"]
    assert [item.get("type", item.get("role")) for item in params["input"]] == [
        "system", "user", "assistant", "function_call", "function_call_output", "user",
    ]  # fmt: skip
    assert params["tools"][0]["name"] == "look"
    assert nemo_rows.from_row(row) == TASK


def test_foreign_nemo_rows_are_tasks() -> None:
    row = {
        "responses_create_params": {
            "input": [
                {"role": "developer", "content": [{"type": "input_text", "text": "Solve."}]},
                {"role": "user", "content": "If x + 5 = 12, what is x?"},
            ],
            "tools": [TOOL],
        },
        "verifier_metadata": {"expected_answer": "7"},
    }
    task = nemo_rows.from_row(row, env="mathematics")
    assert task.messages[0] == {"role": "system", "content": "Solve."}
    assert task.metadata["answer"] == "7" and task.tools == (TOOL,)
    beside = {"responses_create_params": {"input": "2?"}, "answer": "2", "agent_ref": {"name": "m"}}
    assert nemo_rows.from_row(beside).metadata == {"answer": "2"}
    assert nemo_rows.from_row(beside).env == "m"
    with pytest.raises(ValueError, match="names no agent"):
        nemo_rows.from_row(row)
    with pytest.raises(ValueError, match="input missing"):
        nemo_rows.from_row({})


def _counter() -> Any:
    """Return a world in which 'up' is said ``seed % 3 + 1`` times."""
    gymnasium = pytest.importorskip("gymnasium")

    class Counter(gymnasium.Env):  # type: ignore[misc]
        action_space = gymnasium.spaces.Text(4, charset="updownsleep")
        observation_space = gymnasium.spaces.Text(80)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict]:
            self.left = (seed or 0) % 3 + 1
            return f"Say 'up' {self.left} times.", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
            if action == "slee":
                time.sleep(1.0)
            if action == "d":
                raise RuntimeError("the world broke")
            if action != "up":
                return "Wrong.", 0.0, True, False, {}
            self.left -= 1
            return f"{self.left} left.", float(self.left == 0), self.left == 0, False, {}

    return Counter()


class Counting(GymnasiumEnvironment):
    name = "counting"
    make = staticmethod(_counter)

    def solve(self, seed: int) -> Sequence[str]:
        return ["I go up.\nup"] * (seed % 3 + 1)


class Lake(GymnasiumEnvironment):
    name = "lake"
    make = staticmethod(
        lambda: pytest.importorskip("gymnasium").make("FrozenLake-v1", is_slippery=False)
    )

    def solve(self, seed: int) -> Sequence[str]:
        return list("112122")  # down down right down right right on the 4x4 map


def test_gymnasium_worlds_hold() -> None:
    for kind, number in ((Counting, 6), (Lake, 2)):
        tasks = kind.load("test", number)
        report = asyncio.run(validate(kind, tasks, Services()))
        assert report.tallies["gold"].scores == [1.0] * number, report.tallies["gold"].problems
        assert report.tallies["words"].mean == report.tallies["empty"].mean == 0.0
    assert not {t.id for t in tasks} & {t.id for t in Lake.load("train", 20)}


@pytest.mark.parametrize(("said", "status"), [("slee", "timeout"), ("d", "error")])
def test_a_world_that_hangs_or_breaks_is_no_zero(said: str, status: str) -> None:
    async def run() -> None:
        env = Counting(Services())
        (task,) = Counting.load("train", 1)
        first = await env.reset(task, 0)
        assert "up" in first.messages[-1]["content"]
        still = await env.step(Answer("I do not know"))
        assert not still.terminated and "No action" in still.messages[0]["content"]
        env.step_s = 0.2  # type: ignore[misc]
        step = await env.step(Answer(said))
        assert step.terminated and step.verdict is not None and step.reward is None
        assert step.verdict.status == status
        await env.close()

    asyncio.run(run())
