"""How far a run is, as lines to read."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.parts import done_in
from megatron_k2.agentic.stages.runner import Stage, spent_so_far


def status(layout: Layout, stages: Sequence[Stage]) -> list[str]:
    """Return the state of each stage, and what was spent."""
    found = []
    for stage in stages:
        manifest = layout.manifest(stage.name)
        if manifest is not None:
            words = ", ".join(
                f"{one['lines']:,} {name.removesuffix('.jsonl')}"
                for name, one in manifest.files.items()
                if "lines" in one
            )
            found.append(f"{stage.name:<13} done       {words or ', '.join(manifest.files)}")
            counts = {k: n for k, n in manifest.counts.items() if not k.count("tokens ")}
            found += [f"{'':<13}   {name}: {number:,}" for name, number in counts.items()]
        elif layout.under_way(stage.name) is not None:
            steps = ", ".join(
                f"{number:,} units of {step}"
                for step, number in done_in(layout.work(stage.name)).items()
            )
            found.append(f"{stage.name:<13} under way  {steps or 'begun'}")
        else:
            found.append(f"{stage.name:<13} missing")
    requests, tokens = spent_so_far(layout, stages)
    return [*found, f"spent so far  {requests:,} requests, {tokens:,} tokens"]
