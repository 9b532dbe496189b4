"""MuonClip's configuration: Megatron's ``OptimizerConfig`` and what upstream has no field for.

Upstream's fields keep their meaning (``muon_momentum``, ``muon_coefficient_type``, ``adam_beta1``,
...); defaults are Kimi K2's where upstream's differ (``arguments.MUONCLIP_DEFAULTS`` has sources).
Ours begin with ``k2_`` and have a flag of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_k2.flags import MUONCLIP as NAME
from megatron_k2.optimizer.coefficients import coefficient_schedule
from megatron_k2.optimizer.directions import BATCH_BYTES, Orthogonaliser, UpdateRule
from megatron_k2.optimizer.matrices import Split
from megatron_k2.optimizer.muonclip import Offload
from megatron_k2.optimizer.rules import load_rule, register_rule
from megatron_k2.optimizer.symmetric_products import load_backend

WORKSPACE_BYTES = 4 << 30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class MuonClipConfig(OptimizerConfig):
    """Configuration of ``--optimizer muonclip``.

    Attributes:
        k2_muon_rule: update rule, see ``rules.py``.
        k2_muon_split: what one matrix of the MLA up-projections is: ``whole``, ``part``, ``head``.
        k2_muon_dtype: of Newton-Schulz products; None follows ``muon_fp32_matmul_prec``.
        k2_muon_backend: whose symmetric products, ``torch`` or ``triton``.
        k2_muon_wire: number format of what travels to a home: fp32, or bf16 for half the bytes.
        k2_muon_momentum: number format of the momentum between steps: fp32 or bf16.
        k2_muon_workspace_bytes: cap of what a step allocates for the time it takes.
        k2_optimizer_offload: what lies in host memory between steps, see ``offload.py``.
        k2_log_optimizer_interval: steps between measurements of the updates, 0 or None for none.
        k2_qk_clip: apply QK-Clip at the end of the step.
        qk_clip_threshold, qk_clip_alpha: tau and the query's share, as upstream.
    """

    optimizer: str = NAME
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    use_distributed_optimizer: bool = True
    muon_nesterov: bool = True
    muon_coefficient_type: str = "kimi"
    muon_num_ns_steps: int | None = None  # type: ignore[assignment]
    muon_extra_scale_factor: float = 0.2
    k2_muon_rule: str = "muon"
    k2_muon_split: Split = "whole"
    k2_muon_dtype: str | None = None
    k2_muon_backend: str = "torch"
    k2_muon_wire: str = "fp32"
    k2_muon_momentum: str = "fp32"
    k2_muon_workspace_bytes: int = WORKSPACE_BYTES
    k2_optimizer_offload: Offload = "none"
    k2_log_optimizer_interval: int | None = None
    k2_qk_clip: bool = True
    qk_clip_threshold: float = 100.0
    qk_clip_alpha: float = 0.5

    @classmethod
    def from_args(cls, config: OptimizerConfig, args: Any) -> MuonClipConfig:
        """Return the configuration of a run: upstream's fields, and ours from the arguments."""
        values = {one.name: getattr(config, one.name) for one in fields(OptimizerConfig)}
        for one in fields(cls):
            if one.name not in values and hasattr(args, one.name):
                values[one.name] = getattr(args, one.name)
        return cls(**{**values, "optimizer": NAME})

    @classmethod
    def from_upstream(cls, config: OptimizerConfig) -> MuonClipConfig:
        """Return upstream's configuration with Kimi K2's values where it has upstream's Muon's.

        A ``muon_*`` field that still has its upstream default (quintic coefficients, scale 1.0, no
        Nesterov: another recipe) takes K2's, as on the command line; every other field, weight
        decay and betas among them, stays. To have upstream's, say so in a ``MuonClipConfig``.
        """
        values = {one.name: getattr(config, one.name) for one in fields(OptimizerConfig)}
        for one in fields(OptimizerConfig):
            if one.name.startswith("muon_") and values[one.name] == one.default:
                values[one.name] = getattr(cls, one.name)
        return cls(**{**values, "optimizer": NAME})

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of Newton-Schulz products; upstream's ``high`` and ``highest`` are fp32."""
        if self.k2_muon_dtype is not None:
            return _DTYPES[self.k2_muon_dtype]
        return torch.float32 if "high" in self.muon_fp32_matmul_prec else torch.bfloat16

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of pieces on their way to a home."""
        return _DTYPES[self.k2_muon_wire]

    @property
    def momentum_dtype(self) -> torch.dtype:
        """Of Muon's state."""
        return _DTYPES[self.k2_muon_momentum]

    @property
    def wave_bytes(self) -> int:
        """Cap of one wave of travelling matrices; two are under way at a time."""
        return self.k2_muon_workspace_bytes // 4

    def batch_bytes(self, device: torch.device) -> int:
        """Cap of the matrices, fp32, of one call of the rule, whose products take six times that.

        On a CPU also what stays in its cache.
        """
        return min(self.k2_muon_workspace_bytes // 16, BATCH_BYTES.get(device.type, 1 << 62))

    def update_rule(self) -> UpdateRule:
        """Return the update rule.

        Raises:
            ValueError: an unknown rule, coefficient set, scale mode or backend, or a scale that
                is not positive.
        """
        return load_rule(self.k2_muon_rule)(self)


@register_rule("muon")
def muon_rule(config: MuonClipConfig) -> UpdateRule:
    """Return Muon's own rule (Jordan et al. 2024) as the configuration has it."""
    modes = ("spectral", "unit_rms_norm", "shape_scaling")
    if config.muon_scale_mode not in modes:
        raise ValueError(f"--muon-scale-mode {config.muon_scale_mode!r} is not one of {modes}")
    if not config.muon_extra_scale_factor > 0:
        raise ValueError(
            f"--muon-extra-scale-factor {config.muon_extra_scale_factor} must be above 0"
        )
    load_backend(config.k2_muon_backend)
    return Orthogonaliser(
        coefficients=coefficient_schedule(config.muon_coefficient_type, config.muon_num_ns_steps),
        compute_dtype=config.compute_dtype,
        backend=config.k2_muon_backend,
        rms_factor=config.muon_extra_scale_factor,
        scale_mode=config.muon_scale_mode,  # type: ignore[arg-type]
    )
