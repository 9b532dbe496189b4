"""MuonClip's step for parameters that one process holds whole: Muon for matrices, AdamW else.

The rule of Kimi K2 (arXiv 2507.20534) and Moonlight (arXiv 2502.16982): Nesterov momentum,
Newton-Schulz, update of AdamW's root mean square, decoupled weight decay on matrices and norm
gains. QK-Clip is ``qk_clip.py``; the distributed optimizer over flat shards is still to come, and
this one is what it has to equal. fp32 state; no process groups, no Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from megatron_k2.optimizer.directions import Orthogonaliser
from megatron_k2.optimizer.matrices import Rule, add_matrices_, assign, cut_matrices

MOMENTUM = 0.95  # Muon, Moonlight
BETAS, EPS = (0.9, 0.95), 1e-8  # Moonlight's AdamW
WEIGHT_DECAY = 0.1  # both reports


class MuonClip(torch.optim.Optimizer):
    """Muon and AdamW under one learning rate, by name.

    Args:
        named_parameters: names decide, see ``matrices.assign``.
        rules: in order; a matrix that none names is refused.
        lr: of both algorithms.
        momentum: of Muon.
        nesterov: look one step ahead.
        weight_decay: decoupled, on every parameter.
        betas, eps: of AdamW.
        orthogonaliser: of Muon's directions.

    Raises:
        ValueError: a number out of range, or a parameter that no rule names.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        rules: Iterable[Rule],
        lr: float = 2e-4,
        momentum: float = MOMENTUM,
        nesterov: bool = True,
        weight_decay: float = WEIGHT_DECAY,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        orthogonaliser: Orthogonaliser | None = None,
    ) -> None:
        for name, value, allowed in (
            ("lr", lr, lr >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not allowed:
                raise ValueError(f"MuonClip: {name} {value} is out of range")
        rules = tuple(rules)
        groups: dict[str, list[Tensor]] = {"muon": [], "adamw": []}
        self.assignments = {}
        for name, parameter in named_parameters:
            assignment = assign(name, parameter.shape, rules)
            self.assignments[parameter] = assignment
            groups[assignment.rule.algorithm].append(parameter)
        defaults = dict(lr=lr, weight_decay=weight_decay)
        self.orthogonaliser = orthogonaliser or Orthogonaliser()
        super().__init__(
            [
                dict(params=groups["muon"], algorithm="muon", momentum=momentum, nesterov=nesterov),
                dict(params=groups["adamw"], algorithm="adamw", betas=betas, eps=eps),
            ],
            defaults,
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in ``.grad``; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                self._muon_step(parameters, group)
            else:
                self._adamw_step(parameters, group)
        return loss

    def _muon_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter, dtype=torch.float32)
                self.state[parameter]["momentum"] = zeros
        grads = [p.grad.float() for p in parameters if p.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        ahead = momenta
        if group["nesterov"]:
            ahead = list(torch._foreach_add(grads, momenta, alpha=group["momentum"]))
        cuts = [self.assignments[parameter].rule.cut for parameter in parameters]
        cut = [cut_matrices(one, rule) for one, rule in zip(ahead, cuts, strict=True)]
        directions = iter(self.orthogonaliser.directions([m for some in cut for m in some]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, rule, some in zip(parameters, cuts, cut, strict=True):
            add_matrices_(parameter, rule, [next(directions) for _ in some], -group["lr"])

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] += 1
            grad = parameter.grad.float()
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            mean = state["exp_avg"] / (1 - beta1 ** state["step"])
            root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(mean.div_(root).to(parameter.dtype), alpha=-group["lr"])
