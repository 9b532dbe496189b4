"""Two small domains with every kind of operation: for tests and planted trajectories."""

from __future__ import annotations

from functools import cache

from megatron_k2.agentic.records import Domain, Tool
from megatron_k2.agentic.tasks.asking import data

Sample = tuple[Domain, tuple[Tool, ...]]


@cache
def sample_domains() -> tuple[Sample, ...]:
    """Return the domains of ``samples.toml`` with their tools."""
    found = []
    for one in data("samples")["domain"]:
        domain = Domain(
            one["name"],
            one["category"],
            one["description"],
            one["types"],
            tuple(one["policy"]),
            {"file": "tasks/samples.toml"},
        )
        tools = tuple(
            Tool(
                domain.name,
                tool["name"],
                tool["description"],
                tool["parameters"],
                domain.category,
                "evolved",
                tool["operation"],
                {"file": "tasks/samples.toml"},
            )
            for tool in one["tools"]
        )
        found.append((domain, tools))
    return tuple(found)
