"""The stages in their order, and what each depends on."""

from __future__ import annotations

from megatron_k2.agentic.stages.body_agents import make_agents_stage
from megatron_k2.agentic.stages.body_judge import judge_stage
from megatron_k2.agentic.stages.body_output import output_stage, report_stage
from megatron_k2.agentic.stages.body_tasks import make_tasks_stage
from megatron_k2.agentic.stages.body_tools import tools_stage
from megatron_k2.agentic.stages.body_trajectories import trajectories_stage
from megatron_k2.agentic.stages.runner import Stage

TOOLS = ("tools/tools.jsonl", "tools/domains.jsonl")
AGENTS = (*TOOLS, "agents/agents.jsonl")
TASKS = (*AGENTS, "tasks/tasks.jsonl")
PLAYED = (*TASKS, "trajectories/trajectories.jsonl")
JUDGED = (*PLAYED, "judge/judgements.jsonl")

STAGES = (
    Stage(
        "tools",
        tools_stage,
        settings=(
            "seed",
            "max_dump_tools",
            "scraped_tools",
            "evolved_tools",
            "real_servers",
            "mcp_url",
        ),
        outside=("dump", "mcp"),
        roles=("evolve",),
    ),
    Stage(
        "agents",
        make_agents_stage,
        reads=TOOLS,
        settings=(
            "seed",
            "agents",
            "server_share",
            "tools_per_agent",
            "model_simulates",
            "real_servers",
        ),
        roles=("agent",),
    ),
    Stage(
        "tasks",
        make_tasks_stage,
        reads=AGENTS,
        settings=("seed", "tasks", "fault_share", "real_servers"),
        roles=("task", "simulator"),
    ),
    Stage(
        "trajectories",
        trajectories_stage,
        reads=TASKS,
        settings=("seed", "attempts", "max_turns", "temperature", "scripted_mistakes"),
        roles=("user", "policy", "simulator"),
    ),
    Stage("judge", judge_stage, reads=PLAYED, settings=("seed", "judging"), roles=("judge",)),
    Stage(
        "output",
        output_stage,
        reads=JUDGED,
        settings=("heldout_share", "heldout_by", "real_servers"),
    ),
    Stage(
        "report",
        report_stage,
        reads=(*JUDGED, "judge/agreement.json", "tools/coverage.png"),
    ),
)
