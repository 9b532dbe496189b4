"""MuonClip's step: Muon for matrices, AdamW else, QK-Clip at the end.

The rule of Kimi K2 (arXiv 2507.20534) and Moonlight (arXiv 2502.16982): Nesterov momentum,
Newton-Schulz, update of AdamW's root mean square, decoupled weight decay on matrices and norm
gains. The parameters are flat shards with a plan of homes (``distributed.py`` builds both) or whole
tensors of one process (``MuonClip.for_model``); the step is the same, and so are its bits. All
element-wise work is done on the shard where it lies; nothing is read back to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor

from megatron_k2.optimizer.directions import (
    BATCH_BYTES,
    Orthogonaliser,
    UpdateRule,
    batches,
    directions_of,
)
from megatron_k2.optimizer.exchange import Exchange, Span, Wave
from megatron_k2.optimizer.geometry import LogicalMatrix, Sharding
from megatron_k2.optimizer.homes import ShardedParameter, plan_homes
from megatron_k2.optimizer.matrices import Rule, assign
from megatron_k2.optimizer.offload import HostOffload
from megatron_k2.optimizer.qk_clip import QKClip
from megatron_k2.optimizer.stacks import Stack, stacks_of
from megatron_k2.optimizer.telemetry import Telemetry

Offload = Literal["none", "moments", "all"]
MOMENTUM = 0.95  # Muon, Moonlight
BETAS, EPS = (0.9, 0.95), 1e-8  # Moonlight's AdamW
WEIGHT_DECAY = 0.1  # both reports


class MuonClip(torch.optim.Optimizer):
    """Muon and AdamW under one learning rate, over shards.

    Args:
        groups: of parameters, each with ``algorithm`` "muon" or "adamw" beside torch's keys.
        lr: of both algorithms.
        momentum: of Muon.
        nesterov: look one step ahead.
        weight_decay: decoupled, on every group that does not set its own.
        betas, eps: of AdamW.
        rule: from momenta to directions.
        momentum_dtype: of Muon's state; fp32, or bf16 for half the bytes.
        max_batch_bytes: cap of one call of the rule; None for the device's (``BATCH_BYTES``).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 2e-4,
        momentum: float = MOMENTUM,
        nesterov: bool = True,
        weight_decay: float = WEIGHT_DECAY,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        rule: UpdateRule | None = None,
        momentum_dtype: torch.dtype = torch.float32,
        max_batch_bytes: int | None = None,
    ) -> None:
        for name, value, fits, allowed in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
            # At 0 the row of an embedding that no token met is 0 / 0.
            ("eps", eps, eps > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"--optimizer muonclip: {name} {value} must be {allowed}")
        self.rule: UpdateRule = rule or Orthogonaliser()
        self.momentum_dtype, self._batch_bytes = momentum_dtype, max_batch_bytes
        self.exchange: Exchange | None = None
        self.clip: QKClip | None = None
        self.telemetry = Telemetry(0, torch.device("cpu"))
        self.moments, self.masters = HostOffload({}), HostOffload({})
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            betas=betas,
            eps=eps,
            step=0,
        )
        super().__init__(list(groups), defaults)

    @classmethod
    def for_model(
        cls, named_parameters: Iterable[tuple[str, Tensor]], rules: Iterable[Rule], **options: Any
    ) -> MuonClip:
        """Return the optimizer of parameters that this process holds whole.

        Args:
            named_parameters: names decide, see ``matrices.assign``.
            rules: in order; a matrix that none names is refused.
            options: as for the class.

        Raises:
            ValueError: a number out of range, or a parameter that no rule names.
        """
        groups: dict[str, list[Tensor]] = {"muon": [], "adamw": []}
        parameters, rules = [], list(rules)
        for name, parameter in named_parameters:
            rule = assign(name, parameter.shape, rules).rule
            groups[rule.algorithm].append(parameter)
            if rule.algorithm == "muon":
                whole = ((0, parameter.numel()),)
                shape = tuple(parameter.shape)
                parameters.append(ShardedParameter(name, shape, rule.cut, Sharding(), whole))
        named = [dict(params=some, algorithm=algorithm) for algorithm, some in groups.items()]
        optimizer = cls(named, **options)
        optimizer.attach(Exchange(plan_homes(parameters, optimizer.rule.flops)), groups["muon"])
        return optimizer

    def attach(
        self,
        exchange: Exchange,
        shards: Sequence[Tensor | None],
        clip: QKClip | None = None,
        telemetry: Telemetry | None = None,
        offload: Offload = "none",
    ) -> None:
        """Say which shards there are; creates the state.

        Args:
            exchange: of this member, with the plan.
            shards: this member's shard of each parameter of the plan, contiguous; None for none.
            clip: applied after the update.
            telemetry: sees every direction.
            offload: what lies in host memory between steps: nothing, the ``moments``, or ``all``:
                the parameters' shards too, which ``release_shards`` sends back.
        """
        self.exchange, self.shards, self.clip = exchange, list(shards), clip
        self.telemetry = telemetry or Telemetry(0, exchange.device)
        own = self._batch_bytes or BATCH_BYTES.get(exchange.device.type, BATCH_BYTES["cpu"])
        self.max_batch_bytes = own
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        self.stacks = list(stacks_of(exchange.plan, exchange.member, own))
        held: Counter[int] = Counter()
        for stack in self.stacks:
            held[stack.matrix.parameter] += prod(stack.shape)
        self._settled = {
            id(shard)
            for index, shard in enumerate(self.shards)
            if shard is not None and held[index] == shard.numel()
        }
        """Shards that are stacks and nothing else: momentum and decay are done with the rest."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.init_state(parameter, group)
        self._batches = [
            [self.stacks[position] for position in batch]
            for batch in batches([stack.shape for stack in self.stacks], own)
        ]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if offload != "none":
            self.moments = HostOffload({id(p): _tensors(self.state[p]) for p in parameters})
        if offload == "all":
            self.masters = HostOffload({id(p): [p.detach()] for p in parameters})

    def release_shards(self) -> None:
        """Send the parameters' shards to the host, once they are copied to the model."""
        self.masters.release(self.masters.tensors)

    def fetch_shards(self) -> None:
        """Have the parameters' shards on the device."""
        self.masters.fetch(self.masters.tensors)

    def tensors_of(self, shard: Tensor) -> dict[str, Tensor]:
        """Return a shard ("param") and its state where they are now, to read or to fill."""
        own = self.moments.current(id(shard)) if self.moments.holds(id(shard)) else None
        state = {k: v for k, v in self.state[shard].items() if isinstance(v, Tensor)}
        if own is not None:
            state = dict(zip(state, own, strict=True))
        whole = self.masters.current(id(shard))[0] if self.masters.holds(id(shard)) else shard
        return {"param": whole, **state}

    def init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Create the state of one shard, zero."""
        state = self.state[parameter]
        if state:
            return
        if group["algorithm"] == "muon":
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self.momentum_dtype)
        else:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in ``.grad``; parameters without one stay.

        Collective: over the members of the exchange and, with a clip, over its group.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.clip is not None:
            self.clip.start()
        self.fetch_shards()
        travelling: list[int] = []
        for group in self.param_groups:
            group["step"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                moved = [p for p in parameters if id(p) not in self._settled]
                travelling += [id(p) for p in moved]
                self.moments.fetch(travelling)
                self._momentum_step(moved, group)
            else:
                self._adamw_step(parameters, group)
        self.telemetry.begin(max((group["step"] for group in self.param_groups), default=0))
        self._muon_step()
        self.moments.release(travelling)
        if self.clip is not None:
            self.clip.apply_()
        return loss

    def _momentum_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Take the gradients into the momenta, and decay the weights."""
        for parameter in parameters:
            assert parameter.grad is not None
            self._accumulate_(self.state[parameter]["momentum_buffer"], parameter.grad, group)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _accumulate_(self, momentum: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if momentum.dtype == torch.float32:
            momentum.mul_(group["momentum"]).add_(grad)
            return
        for part, gradient in self._cut(momentum, grad):
            part.copy_(part.float().mul_(group["momentum"]).add_(gradient))

    def _cut(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the same pieces of tensors of one shape, small enough for the workspace."""
        if not tensors[0].is_contiguous():
            yield tensors
            return
        flat = [tensor.view(-1).split(max(1, self.max_batch_bytes // 4)) for tensor in tensors]
        yield from zip(*flat, strict=True)

    def _muon_step(self) -> None:
        """Orthogonalise what is at home here; send, receive and apply the rest."""
        assert self.exchange is not None, "attach() comes before step()"
        num_waves = len(self.exchange.routes)
        wave = self._ask(0) if num_waves else None
        self._stack_step()
        for index in range(num_waves):
            assert wave is not None
            momenta = wave.matrices()
            following = self._ask(index + 1) if index + 1 < num_waves else None
            wave.reply(self._directions(momenta))
            wave.finish(self._add_span_)
            wave = following

    def _ask(self, wave: int) -> Wave:
        assert self.exchange is not None
        return self.exchange.ask(wave, self._read_span)

    def _stack_step(self) -> None:
        """Update the matrices that lie whole in this shard."""
        assert self.exchange is not None
        keys = [[id(self._shard(one.matrix.parameter)) for one in some] for some in self._batches]
        last = {key: index for index, some in enumerate(keys) for key in some}
        for index, batch in enumerate(self._batches):
            self.moments.fetch(keys[index])
            self.moments.prefetch(keys[index + 1] if index + 1 < len(keys) else ())
            chosen = [stack for stack in batch if self._has_grad(stack)]
            if chosen:
                self._update_stacks_(chosen)
            done = (key for key in keys[index] if last[key] == index and key in self._settled)
            self.moments.release(done)

    def _update_stacks_(self, chosen: Sequence[Stack]) -> None:
        """Update the matrices of one batch."""
        assert self.exchange is not None
        directions = directions_of([self._read_stack(one) for one in chosen], self.rule)
        for stack, direction in zip(chosen, directions, strict=True):
            self._observe(stack.matrix, direction)
            parameter = self._shard(stack.matrix.parameter)
            view = stack.view(parameter)
            if id(parameter) in self._settled:
                group = self._group_of[id(parameter)]
                view.mul_(1 - group["lr"] * group["weight_decay"])
            update = self.exchange.round(direction).reshape(view.shape)
            view.add_(update, alpha=-self._rate(parameter, stack.matrix))

    def _directions(self, momenta: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the directions of assembled matrices [1, rows, columns]."""
        found: dict[int, Tensor] = {}
        indices = list(momenta)
        shapes = [(1, *momenta[index].shape[1:]) for index in indices]
        for batch in batches(shapes, self.max_batch_bytes):
            chosen = [indices[position] for position in batch]
            directions = directions_of([momenta.pop(index) for index in chosen], self.rule)
            found.update(zip(chosen, directions, strict=True))
            for index, direction in zip(chosen, directions, strict=True):
                self._observe(self._matrix(index), direction)
        return found

    def _observe(self, matrix: LogicalMatrix, directions: Tensor) -> None:
        if self.telemetry.active:
            assert self.exchange is not None
            name = self.exchange.plan.parameters[matrix.parameter].name
            scale = self.rule.scale(matrix.rows, matrix.columns)
            self.telemetry.observe(name, directions, scale)

    def _shard(self, index: int) -> Tensor:
        shard = self.shards[index]
        assert shard is not None, "the plan says that this rank holds a part"
        return shard

    def _has_grad(self, stack: Stack) -> bool:
        return self._shard(stack.matrix.parameter).grad is not None

    def _ahead(self, parameter: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a view of the momentum, one step ahead under Nesterov, in the wire's dtype."""
        assert self.exchange is not None
        group = self._group_of[id(parameter)]
        momentum = view(self.state[parameter]["momentum_buffer"]).float()
        if group["nesterov"]:
            assert parameter.grad is not None, "every shard that travels has a gradient"
            grad = view(parameter.grad).float()
            momentum = torch.add(grad, momentum, alpha=group["momentum"])
        return momentum.to(self.exchange.wire_dtype)

    def _read_stack(self, stack: Stack) -> Tensor:
        parameter = self._shard(stack.matrix.parameter)
        if id(parameter) in self._settled:
            assert parameter.grad is not None, "stacks without a gradient are left out"
            momentum = stack.view(self.state[parameter]["momentum_buffer"])
            group = self._group_of[id(parameter)]
            self._accumulate_(momentum, stack.view(parameter.grad), group)
        return self._ahead(parameter, stack.view).reshape(stack.shape)

    def _matrix(self, index: int) -> LogicalMatrix:
        assert self.exchange is not None
        return self.exchange.plan.matrices[index].matrix

    def _read_span(self, span: Span) -> Tensor:
        index, start, stop = span
        parameter = self._shard(self._matrix(index).parameter)
        return self._ahead(parameter, lambda flat: flat.view(-1)[start:stop])

    def _add_span_(self, span: Span, direction: Tensor) -> None:
        index, start, stop = span
        matrix = self._matrix(index)
        parameter = self._shard(matrix.parameter)
        rate = self._rate(parameter, matrix)
        parameter.view(-1)[start:stop].add_(direction, alpha=-rate)

    def _rate(self, parameter: Tensor, matrix: LogicalMatrix) -> float:
        """Return what multiplies a matrix's direction."""
        lr: float = self._group_of[id(parameter)]["lr"]
        return lr * self.rule.scale(matrix.rows, matrix.columns)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Decoupled weight decay and bias correction as torch.optim.AdamW has them."""
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            assert parameter.grad is not None
            self.moments.fetch([id(parameter)])
            state = self.state[parameter]
            parts = self._cut(parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            for weight, gradient, average, square in parts:
                grad = gradient.float()
                average.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                mean = average / (1 - beta1 ** group["step"])
                root = (square / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(mean.div_(root).to(weight.dtype), alpha=-group["lr"])
            self.moments.release([id(parameter)])


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]
