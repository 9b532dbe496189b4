"""Environments by name: ours, and those that other packages bring as entry points.

A package adds one with an entry point of the group ``megatron_k2.environments``, ``name =
package.module:Class``; its class is imported when the name is asked for. A name of that form is
taken as it stands: an environment that is tried out needs no package.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from megatron_k2.compat import entry_points
from megatron_k2.gym.base import Environment

GROUP = "megatron_k2.environments"
OURS: dict[str, str] = {
    "coding": "megatron_k2.gym.coding:Coding",
    "issues": "megatron_k2.gym.issues.environment:Issues",
    "issues_agent": "megatron_k2.gym.issues.agent:IssuesAgent",
    "mathematics": "megatron_k2.gym.mathematics:Mathematics",
    "reasoning": "megatron_k2.gym.reasoning:Reasoning",
    "faithfulness": "megatron_k2.gym.faithfulness:Faithfulness",
    "instructions": "megatron_k2.gym.instructions.environment:Instructions",
    "instructions_judged": "megatron_k2.gym.instructions.environment:JudgedInstructions",
    "safety": "megatron_k2.gym.safety.environment:Safety",
    "tool_use": "megatron_k2.agentic.environment:ToolUse",
    "critic_pairs": "megatron_k2.rl.critic.environment:CriticPairsEnvironment",
    "open_prompts": "megatron_k2.rl.critic.open_prompts:OpenPrompts",
    "open_ranked": "megatron_k2.rl.critic.open_prompts:RankedPrompts",
}


@cache
def known() -> dict[str, str]:
    """Return name -> ``module:Class`` of every environment that is installed.

    Raises:
        ValueError: two packages bring the same name.
    """
    found = dict(OURS)
    for name, value in entry_points(GROUP):
        if found.get(name, value) != value:
            raise ValueError(f"environment {name!r} is both {found[name]} and {value}")
        found[name] = value
    return found


def environment(name: str) -> type[Environment]:
    """Return the class of an environment.

    Raises:
        ValueError: no such name, of which it lists those that there are; or it is no environment.
        ImportError: a package that it needs is missing.
    """
    if ":" not in name and name not in known():
        raise ValueError(f"environment {name!r} is none of {', '.join(sorted(known()))}")
    module, _, attribute = known().get(name, name).partition(":")
    try:
        found: type[Environment] = getattr(import_module(module), attribute)
    except AttributeError as error:
        raise ValueError(f"environment {name!r}: {module} has no {attribute}") from error
    except TypeError as error:  # a relative module
        raise ValueError(f"environment {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ValueError(
            f"environment {name!r}: {attribute} is no subclass of gym.base.Environment"
        )
    return found
