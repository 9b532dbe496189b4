"""The ablations of tools/evidence/rl_learning.py change what they say."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.base import Task
from megatron_k2.rl.run_file import run_from
from megatron_k2.training.rl_players import rollout_settings

FOLDER = Path(__file__).resolve().parents[3] / "tools" / "evidence"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("rl_learning", FOLDER / "rl_learning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rl_learning", module)
    spec.loader.exec_module(module)
    return module


def test_without_a_budget_only_the_context_ends_an_answer(tool: Any, tmp_path: Path) -> None:
    options = argparse.Namespace(ablations=True, out=tmp_path, adam_lr="1e-4")
    tables = tomllib.loads(tool.RUN_FILE.read_text())
    (arm,) = [one for one in tool.arms(options) if one.name == "no budget"]
    task = Task("1", "reasoning", (), budget=4096)  # as reasoning's tables have it
    usual = run_from(tables)
    assert rollout_settings(usual, 0, 1).budget_of(task, 4096) == 14
    for place, value in arm.changes.items():
        table, _, key = place.partition(".")
        tables[table][key] = value
    run = run_from(tables)
    assert rollout_settings(run, 0, 1).budget_of(task, 4096) == tool.RL_SEQ_LENGTH
    assert usual.rewards.over_budget_penalty > 0 == run.rewards.over_budget_penalty
