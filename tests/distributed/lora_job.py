"""Adapters of one layout as they start, for the comparison with one process."""

from __future__ import annotations

from typing import Any

from tests.distributed.muonclip_job import Run, build, weights
from tests.distributed.training_job import initialize


def starts(layout: dict[str, Any]) -> dict[str, Any]:
    """Return (name, whole shape, place, array) of every adapter of this rank, freshly built."""
    job = Run(layout=layout, model="lora", clip=False)
    model, _ = build(job, initialize(layout))
    return {"pieces": [], "weights": [one for one in weights(model) if "lora_" in one[0]]}
