"""Agents: a subset of tools, the policy word for word, bad answers asked again and dropped."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_k2.agentic.tasks.agents import rules_of
from megatron_k2.agentic.tasks.samples import sample_domains
from megatron_k2.agentic.tasks.settings import TaskSettings
from tests.unit.agentic.tasks.written import Editing, agents

DOMAIN, TOOLS = sample_domains()[0]


def test_prompts_carry_policy_and_rules_word_for_word() -> None:
    made = agents(DOMAIN, TOOLS, agents=12)
    assert len(made.kept) == 12 and not made.dropped
    for agent in made.kept:
        lines = [*DOMAIN.policy, *(rule["text"] for rule in rules_of(agent))]
        assert all(f"- {line}" in agent.system for line in lines)
        assert agent.origin["role"] in agent.system
    assert any(rules_of(agent) for agent in made.kept)


def test_agents_differ_and_have_a_subset_of_the_tools() -> None:
    made = agents(DOMAIN, TOOLS, agents=12, tools_per_agent=(2, 5))
    assert len({agent.system for agent in made.kept}) == 12
    assert all(2 <= len(agent.tools) <= 5 for agent in made.kept)
    assert len({agent.tools for agent in made.kept}) > 6


def test_the_same_settings_give_the_same_agents_and_another_seed_others() -> None:
    first, again = (agents(DOMAIN, TOOLS).kept for _ in range(2))
    assert first == again
    assert not set(one.id for one in first) & {one.id for one in agents(DOMAIN, TOOLS, seed=1).kept}


@pytest.mark.parametrize(
    "edit",
    [
        lambda one: one.update(tools=["no_such_tool"]),
        lambda one: one.update(system=""),
        lambda one: one.update(rules=[{"text": "Never.", "tool": "no_such_tool"}]),
        lambda one: "I would rather not.",
    ],
)
def test_an_answer_that_cannot_be_used_is_asked_again_and_dropped(edit: Any) -> None:
    model = Editing("agent", edit)
    made = agents(DOMAIN, TOOLS, model, agents=1, tries=3)
    assert not made.kept and made.dropped == {"unreadable or refused": 1}
    assert model.num_asked == 3


def test_a_domain_without_tools_gives_no_agents() -> None:
    assert agents(DOMAIN, ()).dropped == {"no tools": 3}


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="tools_per_agent 5 to 2"):
        TaskSettings(tools_per_agent=(5, 2))
    with pytest.raises(ValueError, match="levels"):
        TaskSettings(levels=(6,))
