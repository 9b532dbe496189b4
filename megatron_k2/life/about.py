"""``life.json``: what a run is made with: settings, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import megatron_k2
from megatron_k2 import compat
from megatron_k2.life.plan import Life
from megatron_k2.training.stages import read_json, write_json

VERSIONS_OF = ("torch", "megatron-core", "transformers", "openai", "reasoning-gym", "tiktoken")


def write_about(life: Life, out: Path, seed: int, threads: int) -> None:
    """Write ``life.json``; the time of the first run stays."""
    path = out / "life.json"
    before = read_json(path) or {}
    write_json(path, {**before, **about(life, seed, threads)})


def about(life: Life, seed: int, threads: int) -> dict[str, Any]:
    """Return what is to be known of a run."""
    return {
        "name": life.name,
        "title": life.title,
        "seed": seed,
        "settings": dict(life.settings),
        "versions": {
            "megatron-k2": megatron_k2.__version__,
            "python": platform.python_version(),
            **{name: compat.distribution_version(name) for name in VERSIONS_OF},
        },
        "code": _commit() or f"wheel {megatron_k2.__version__}",
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "threads a process": threads,
            "system": f"{platform.system()} {platform.release()}",
        },
        "stages": [{"name": stage.name, "title": stage.title} for stage in life.stages],
    }


def _commit() -> str:
    """Return the commit of the checkout that runs, with ``+`` where files differ; else nothing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
            )
        except OSError:  # a checkout on a machine without git
            return ""
        found.append(done.stdout.strip())
    return f"commit {found[0]}" + ("+" if found[1] else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
