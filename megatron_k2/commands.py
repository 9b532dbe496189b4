"""Every command of ``megatron-k2``: its name, what runs it, and a line about it.

``megatron-k2 NAME`` and ``python -m megatron_k2 NAME`` call the function of the row without
arguments, flags in ``sys.argv``; ``tools/NAME.py`` of a checkout, hyphens as underscores, is the
same. A new command is a new row. Nothing is imported until it is called. Left out: flags, which
each command says itself (``--help``).
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROGRAM = "megatron-k2"


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
        name: what is typed.
        target: ``module:function`` below ``megatron_k2``, called without arguments.
        summary: one line for the list of commands.
        is_plain: the function returns what failed, and raises, instead of returning an exit
            status; ``run_tool`` makes lines and a status of it.
    """

    name: str
    target: str
    summary: str
    is_plain: bool = False

    def load(self) -> Callable[[], Any]:
        """Import the function.

        Raises:
            ImportError: a package that the command needs is missing.
        """
        module, _, function = self.target.partition(":")
        found: Callable[[], Any] = getattr(
            importlib.import_module(f"megatron_k2.{module}"), function
        )
        return found


# fmt: off
COMMANDS: dict[str, tuple[Command, ...]] = {
    "this machine": (
        Command("doctor", "doctor.command:main",
                "what is installed, what it enables, what is wrong; checks a release"),
        Command("plan", "planning.command:main", "layouts that fit a cluster, by which flags"),
        Command("gpu-check", "gpu_check.command:main",
                "what this code does on your GPUs, in a report that can be sent back"),
    ),
    "everything, small": (
        Command("life", "life.command:main",
                "the whole life of a small K2, from text to a served model"),
    ),
    "training (several processes: torchrun --nproc-per-node N -m megatron_k2 NAME ...)": (
        Command("pretrain", "training.pretrain:cli", "Megatron's pretraining with K2's parts"),
        Command("sft", "training.sft:cli", "fine-tuning on packed dialogues"),
        Command("rl", "training.rl:cli", "reinforcement learning; the run is a TOML file"),
        Command("pretrain-from-text", "training.from_text:main",
                "a text file to a trained, exported k2-nano; starts its own processes"),
        Command("run-recipe", "training.recipes.command:main", "all stages of a recipe, resumable"),
        Command("sweep", "training.sweeps.command:main", "a grid of flags x seeds"),
        Command("scaling-law", "planning.scaling.command:main",
                "loss over FLOPs and sparsity: run a grid, fit it, ask it"),
    ),
    "data": (
        Command("preprocess-data", "data.preprocess.command:preprocess",
                "documents to Megatron's .bin and .idx; train-tokenizer, verify, where", True),
        Command("blend-data", "training.tools:blend_data",
                "corpora to a blend, each token seen as often as asked", True),
        Command("rephrase-data", "training.tools:rephrase_data",
                "verified rewritings of documents by a language model", True),
        Command("preprocess-sft", "data.dialogues.command:preprocess",
                "dialogues to packed rows for fine-tuning", True),
        Command("synthesize-agentic", "training.tools:synthesize_agentic",
                "tools, agents, tasks, trajectories, judged and filtered", True),
        Command("install-mcp-servers", "agentic.real.install:main",
                "the real MCP servers that agentic tasks use, pinned"),
    ),
    "checkpoints": (
        Command("convert-checkpoint", "training.convert:main",
                "Hugging Face <-> Megatron, exact, resumable; plan, verify"),
        Command("lora", "training.lora:main", "adapters to PEFT's format, or into a model"),
    ),
    "a trained model": (
        Command("generate", "training.generate:main", "a prompt or a chat in the terminal"),
        Command("sample", "training.sample:cli", "text from a checkpoint, by Megatron's flags"),
        Command("serve", "training.tools:serve", "OpenAI's API over HTTP", True),
        Command("evaluate", "evaluation.command:evaluate",
                "exact answers, tool calls, lm-evaluation-harness, of a served model", True),
    ),
    "reinforcement learning": (
        Command("gym", "gym.command:gym", "environments: list, show, gold, validate", True),
        Command("curate-tasks", "training.tools:curate_tasks",
                "tasks worth training on, by pass@k of a model", True),
        Command("critic-rows", "rl.critic.command:critic_rows",
                "preference pairs to rows that bootstrap the critic", True),
        Command("build-issue-tasks", "gym.issues.command:build",
                "a git repository's history to tasks", True),
        Command("augment-instructions", "gym.instructions.command:augment_instructions",
                "a model proposes instructions whose checks it writes", True),
        Command("evolve-attacks", "gym.safety.command:evolve",
                "prompts that must be declined, evolved against a model", True),
    ),
}
# fmt: on


def find(name: str) -> Command | None:
    """Return the command of a name, None where there is none."""
    return next((one for rows in COMMANDS.values() for one in rows if one.name == name), None)


def names() -> list[str]:
    """Return the names of all commands, in the table's order."""
    return [one.name for rows in COMMANDS.values() for one in rows]


def near(name: str) -> str:
    """Return the name most like a mistyped one; empty where none is."""
    typed = name.removesuffix(".py").replace("_", "-")
    return next(iter(difflib.get_close_matches(typed, names(), n=1)), "")


def listing() -> str:
    """Return all commands with their summaries, by topic."""
    width = max(map(len, names()))
    lines = []
    for topic, rows in COMMANDS.items():
        lines += [f"{topic}:", *(f"  {one.name:{width}}  {one.summary}" for one in rows), ""]
    return "\n".join(lines)


def as_typed(text: str, name: str) -> str:
    """Return a command's help or usage error with the tools named as ``megatron-k2`` knows them.

    The parsers call themselves as in a checkout, ``gym.py``; in an installed package there is no
    such file to run.

    Args:
        text: what the command's parser would print.
        name: of the command that runs.
    """
    scripts = "|".join(one.replace("-", "_") for one in names())
    written = re.compile(rf"(?<![\w/.-])(?:[\w./-]*python )?(?:tools/)?({scripts})\.py\b")
    head, blank, rest = text.partition("\n\n")
    script = name.replace("-", "_") + ".py"
    if head.startswith(f"usage: {script}"):  # lines of a long usage hang below its first flag
        head = head.replace("\n" + " " * len(f"usage: {script} "), "\n    ")
    renamed: str = written.sub(
        lambda found: f"{PROGRAM} {found[1].replace('_', '-')}", head + blank + rest
    )
    return renamed
