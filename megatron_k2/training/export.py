"""The trained model of the main job as a Hugging Face folder, checked against the checkpoint.

``hf/`` holds weights, config.json, generation_config.json and the tokenizer: transformers loads and
generates with it. The check reads every byte again and runs both models layer by layer, ours as
Megatron loads it and transformers' (training/compare_layers.py).
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.training import stages
from megatron_k2.training.job import Job
from megatron_k2.training.launch import run_module

CONVERT_MODULE = "megatron_k2.training.convert"


def export(job: Job, train_iters: int) -> dict[str, Any]:
    """Export the last checkpoint and check it, once; return the check's figures.

    Args:
        job: a run whose training is done.
        train_iters: its steps; an export of fewer is replaced.

    Returns:
        ``train_iters`` and ``largest_difference`` of hidden states and logits, in spreads of the
        values.

    Raises:
        RuntimeError: the model cannot be exported, or the export is not the model.
    """
    record = job.output / "export.json"
    done = stages.read_json(record)
    if done is not None and done["train_iters"] == train_iters and job.exported.is_dir():
        return done
    record.unlink(missing_ok=True)
    shutil.rmtree(job.exported, ignore_errors=True)
    try:
        conversions.to_hf(job.checkpoints, job.exported, Options(), workers=1, quiet=True)
    except ConversionRefused as error:
        raise RuntimeError(f"the model cannot be exported: {error}") from error
    done = {"train_iters": train_iters, "largest_difference": _check(job)}
    stages.write_json(record, done)
    return done


def _check(job: Job) -> float:
    log = job.output / "export.log"
    log.unlink(missing_ok=True)
    arguments = ["verify", str(job.checkpoints), str(job.exported), "--hidden-states", "--json"]
    run_module(CONVERT_MODULE, arguments, log, num_processes=1)
    lines = log.read_text(encoding="utf-8").splitlines()
    found = next(line for line in reversed(lines) if line.startswith('{"problems"'))
    return float(json.loads(found)["largest_difference"])
