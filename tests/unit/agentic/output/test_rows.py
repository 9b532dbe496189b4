"""Rows for fine-tuning with the real encoder, tasks for RL, and the way back from a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.agentic.output import rejected, sft
from megatron_k2.agentic.output.provenance import by_id, trace
from megatron_k2.agentic.output.rl_tasks import line, splits
from megatron_k2.agentic.records import Agent, AgentTask, Domain, Judgement, Trajectory
from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.data.dialogues.encode import DialogueEncoder, Encoded, Options
from tests.unit.agentic.judge.dialogues import BEFORE, TOOLS, TYPES, Script, good, task
from tests.unit.chat.kimi_files import write_tokenizer

DOMAIN = Domain("website_control/shop", "website_control", "A shop.", TYPES, (), {"prompt": "d/1"})
AGENT = Agent(DOMAIN.name, "You help.", tuple(tool.id for tool in TOOLS), {"prompt": "agent/1"})
ORDER = {"order_id": "order-7"}
SYSTEM, USER = "You help the customers of a shop.", "Please cancel order-7."


def of_agent() -> AgentTask:
    return replace(task(), agent=AGENT.id, origin={"form": "one", "prompts": 3, "model": "k2"})


def judged(played: Trajectory, *reasons: str) -> Judgement:
    return Judgement(played.id, not reasons, {}, {}, {}, reasons, ("judge-model",))


def row_of(script: Script) -> dict[str, Any]:
    played = script.done(of_agent())
    return sft.row(played, judged(played), of_agent(), AGENT, "train")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("kimi"))


def learned(tokenizer: Path, row: dict[str, Any]) -> tuple[list[str], str]:
    """The stretches that are learned, and all that is not, through JSON and the encoder of SFT."""
    options = Options(str(tokenizer), seq_length=8192, tool_checks="drop")
    found = DialogueEncoder(options).encode(json.loads(json.dumps(row)))
    assert isinstance(found, list), found
    (one,) = found
    assert isinstance(one, Encoded)
    kimi, stretches, others, before = KimiFormat.load(tokenizer), [], [], 0
    for token, counts in zip(one.ids.tolist(), one.learned.tolist(), strict=True):
        if counts and not before:
            stretches.append([])
        (stretches[-1] if counts else others).append(token)
        before = counts
    return [kimi.decode(ids) for ids in stretches], kimi.decode(others)


def test_calls_and_answers_are_learned_and_tools_and_users_are_not(tokenizer: Path) -> None:
    stretches, others = learned(tokenizer, row_of(good().user("Thanks!").say("You are welcome.")))
    first, second, answer, last = stretches
    assert first.startswith("<|tool_calls_section_begin|><|tool_call_begin|>functions.get_order:0")
    assert '{"order_id": "order-7"}' in first and first.endswith("<|im_end|>")
    assert "functions.cancel_order:1" in second
    assert answer == "I have cancelled order-7; its total was 1,234.50.<|im_end|>"
    assert last == "You are welcome.<|im_end|>"
    for unlearned in (SYSTEM, USER, "Thanks!", '"total": 1234.5', '"state": "cancelled"'):
        assert unlearned in others and unlearned not in "".join(stretches)
    assert "## Return of functions.get_order:0" in others
    assert '"name":"refund_order"' in others.replace(" ", "")  # declarations


def test_a_call_against_its_declaration_is_context_and_not_learned(tokenizer: Path) -> None:
    script = (
        Script()
        .call("cancel_order", {"order_id": 7}, outcome="invalid")
        .call("cancel_order", ORDER, {}, writes=True)
        .say("I have cancelled it.")
    )
    row = row_of(script)
    assert [one.get("weight") for one in row["messages"]] == [None, None, 0, None, None, None, None]
    options = Options(str(tokenizer), seq_length=8192)
    assert isinstance(DialogueEncoder(options).encode(row), list)
    row["tools"] = []  # or the dialogue would be dropped for its call
    stretches, others = learned(tokenizer, row)
    assert len(stretches) == 2 and "functions.cancel_order:1" in stretches[0]
    assert '{"order_id": 7}' in others
    unreadable = row_of(Script().call("cancel_order", "{broken", outcome="invalid").say("No."))
    assert unreadable["messages"][2]["weight"] == 0


def test_rejected_rows_have_the_same_form_and_match_the_kept_in_number(tokenizer: Path) -> None:
    of = of_agent()
    broken_off = Script().call("get_order", ORDER, {})
    broken_off.messages.pop()  # the call has no result
    played = [script.done(of) for script in (Script().say("Done."), broken_off)]
    rows = [rejected.row(one, judged(one, "skipped_step"), of, AGENT) for one in played]
    assert rows[1] is None  # nothing is left to learn
    assert rows[0] is not None and rows[0]["provenance"]["reasons"] == ["skipped_step"]
    assert learned(tokenizer, rows[0])[0] == ["Done.<|im_end|>"]
    with pytest.raises(ValueError, match="did not pass"):
        sft.row(played[0], judged(played[0], "skipped_step"), of, AGENT)
    with pytest.raises(ValueError, match="is no control"):
        rejected.row(played[0], judged(played[0]), of, AGENT)
    with pytest.raises(ValueError, match="do not belong together"):
        sft.row(played[0], judged(played[1]), of, AGENT)
    kept = [{"id": f"k{at}", "provenance": {"task": f"t{at}"}} for at in range(3)]
    many = [{"id": f"r{at}", "provenance": {"task": f"t{at}"}} for at in range(2, 30)]
    chosen = rejected.matched(kept, many)
    assert len(chosen) == 3 and chosen[0]["id"] == "r2"
    assert chosen == rejected.matched(kept, many[::-1])
    assert chosen != rejected.matched(kept, many, seed=1)


def test_splits_share_no_world_and_no_goal_even_by_way_of_a_third() -> None:
    def made(goal: int, world: int) -> AgentTask:
        records = {"order": {f"order-{world}": BEFORE["order"]["order-7"]}}
        return replace(of_agent(), goal=f"goal {goal}", world=records, seed=1000 * goal + world)

    tasks = [made(at % 97, at % 53 if at % 2 else 1000 + at) for at in range(300)]
    tasks += [made(5000, 2000), made(5001, 2000), made(5001, 2001)]  # the middle ties the others
    agents = {AGENT.id: AGENT}
    found = splits(tasks, agents)
    assert found == splits(tasks[::-1], agents)
    assert {*found.values()} == {"train", "test"}
    sides: dict[str, set[str]] = {}
    for one in tasks:
        for shared in (one.goal, json.dumps(one.world)):
            sides.setdefault(shared, set()).add(found[one.id])
    assert all(len(one) == 1 for one in sides.values())
    assert len({found[one.id] for one in tasks[-3:]}) == 1
    assert len({*splits(tasks, agents, by="domain").values()}) == 1
    alone = [made(at, at) for at in range(400)]
    share = sum(one == "test" for one in splits(alone, agents, 0.25).values()) / 400
    assert 0.19 < share < 0.31
    with pytest.raises(ValueError, match="--heldout-share"):
        splits(tasks, agents, 1.5)


def test_a_line_for_rl_has_all_that_the_environment_needs() -> None:
    made = json.loads(json.dumps(line(of_agent(), AGENT, DOMAIN, TOOLS[::-1], "train")))
    assert AgentTask.from_json(made["task"]).goal == of_agent().goal
    assert [one["name"] for one in made["tools"]] == [tool.name for tool in TOOLS]
    assert Domain.from_json(made["domain"]).types == TYPES
    with pytest.raises(ValueError, match="tools missing"):
        line(of_agent(), AGENT, DOMAIN, TOOLS[:1], "train")


def test_a_row_is_followed_back_to_tools_prompts_and_models(tmp_path: Path) -> None:
    of = of_agent()
    played = good().done(of)
    judgement = judged(played)
    row = sft.row(played, judgement, of, AGENT)
    files: dict[str, list[Path]] = {}
    stages = {
        "tools": TOOLS, "domains": [DOMAIN], "agents": [AGENT], "tasks": [of],
        "trajectories": [played], "judgements": [judgement],
    }  # fmt: skip
    for kind, records in stages.items():
        files[kind] = [tmp_path / f"{kind}.jsonl"]
        text = "".join(json.dumps(one.to_json()) + "\n" for one in records)
        files[kind][0].write_text(text)
    found = trace(row, by_id(files))
    assert found["missing"] == []
    assert [one["name"] for one in found["tools"]] == [tool.name for tool in TOOLS]
    assert found["prompts"] == ["3", "agent/1", "d/1"]
    assert found["models"] == ["judge-model", "k2", "scripted"]
    changed = files["tools"][0]
    changed.write_text(changed.read_text().replace("get_order of", "get_order off"))
    assert trace(row, by_id(files))["missing"] == [f"tools {TOOLS[0].id}"]
    changed.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        by_id(files)
