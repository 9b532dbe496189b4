"""What MuonClip says at start: the recipe, and which parameter goes where.

One rank of each pipeline stage prints its stage. Shapes are those of whole matrices, whatever the
tensor parallelism; of experts, one expert-parallel rank's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_k2.optimizer.coefficients import coefficient_schedule
from megatron_k2.optimizer.config import MuonClipConfig
from megatron_k2.optimizer.matrices import Rule, assign, assignment_table

logger = logging.getLogger(__name__)


def announce(
    config: MuonClipConfig,
    names: Mapping[torch.nn.Parameter, str],
    rules: Sequence[Rule],
    pgs: ProcessGroupCollection,
) -> None:
    """Log the recipe and the table of this pipeline stage, on the stage's first rank."""
    if pgs.tp.rank() or pgs.intra_dp_cp.rank():
        return
    assignments = [
        assign(name, whole_shape(parameter, pgs), rules)
        for parameter, name in names.items()
        if parameter.requires_grad
    ]
    stage = f"stage {pgs.pp.rank()} of {pgs.pp.size()}"
    experts = f", experts of one of {pgs.ep.size()} ranks" if pgs.ep.size() > 1 else ""
    table = assignment_table(assignments)
    logger.info("MuonClip: %s\n%s%s:\n%s", recipe(config), stage, experts, table)


def recipe(config: MuonClipConfig) -> str:
    """Return the settings in force, in one line."""
    rule = f"rule {config.k2_muon_rule}"
    if config.k2_muon_rule.rpartition(":")[2] == "muon":
        steps = len(coefficient_schedule(config.muon_coefficient_type, config.muon_num_ns_steps))
        rule = (
            f"{config.muon_coefficient_type} coefficients, {steps} steps in "
            f"{str(config.compute_dtype).removeprefix('torch.')}, update "
            f"{config.muon_extra_scale_factor:g} {config.muon_scale_mode}"
        )
    nesterov = " Nesterov" if config.muon_nesterov else ""
    clip = f"QK-Clip at {config.qk_clip_threshold:g}" if config.k2_qk_clip else "no QK-Clip"
    return (
        f"{rule}; momentum {config.muon_momentum:g}{nesterov}; weight decay "
        f"{config.weight_decay:g}; AdamW ({config.adam_beta1:g}, {config.adam_beta2:g}) for the "
        f"rest; {clip}"
    )


def whole_shape(parameter: torch.nn.Parameter, pgs: ProcessGroupCollection) -> tuple[int, ...]:
    """Return a parameter's shape without tensor parallelism (expert parallelism stays)."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        expert = not getattr(parameter, "allreduce", True)
        shape[parameter.partition_dim] *= (pgs.expt_tp if expert else pgs.tp).size()  # type: ignore[attr-defined]
    return tuple(shape)
