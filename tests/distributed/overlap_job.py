"""A training run that also reports in which order gradients and exchanges happened.

Events, of one rank: the name of a parameter when DDP takes its gradient (the product is there),
``send forward`` and ``send backward`` for each all-to-all of the token dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings

from megatron_k2.model.local_linear import adopt_linears_
from tests.distributed.training_job import (
    Routing,
    Run,
    build,
    initialize,
    load_or_save_initial,
    named_parameters,
    preset_config,
    train_steps,
)


def train_overlapped(run: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Train with further configuration fields; return the record and the last step's events."""
    job = Run(**run)
    groups = initialize(job.layout)
    events: list[Any] = []
    with _recorded(events):
        model, optimizer = build(job, groups, **overrides)
        load_or_save_initial(job, model, optimizer)
        record = train_steps(job, groups, model, optimizer, Routing(job, groups))
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    a_step = len(events) // job.num_steps
    record["events"] = [
        event if isinstance(event, str) else names[event] for event in events[-a_step:]
    ]
    return record


@contextmanager
def _recorded(events: list[Any]) -> Iterator[None]:
    """Append to ``events`` whatever DDP and the all-to-all do inside the block."""
    make_hook = DistributedDataParallel._make_backward_post_hook
    forward, backward = mappings._AllToAll.forward, mappings._AllToAll.backward

    def make(self: Any, param: torch.nn.Parameter) -> Callable[..., None]:
        hook = make_hook(self, param)

        def recorded_hook(*unused: Any) -> None:
            events.append(id(param))
            assert not param.grad.requires_grad, "a delayed gradient holds its graph"
            hook(*unused)

        return recorded_hook

    inside: list[str] = []  # upstream's backward exchanges through another forward

    def sent(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def send(*args: Any) -> Any:
            if not inside:
                events.append(name)
            inside.append(name)
            try:
                return function(*args)
            finally:
                inside.pop()

        return send

    DistributedDataParallel._make_backward_post_hook = make
    mappings._AllToAll.forward = staticmethod(sent("send forward", forward))
    mappings._AllToAll.backward = staticmethod(sent("send backward", backward))
    try:
        yield
    finally:
        DistributedDataParallel._make_backward_post_hook = make_hook
        mappings._AllToAll.forward = staticmethod(forward)
        mappings._AllToAll.backward = staticmethod(backward)


def stock_and_delayed_gradients(sequence_parallel: bool) -> dict[str, Any]:
    """Run two microbatches through a column and a row layer, stock and delayed, same weights.

    Returns whether output, input gradients and weight gradients are equal bit for bit, and
    whether the delayed weights had no gradient before ``backward_dw``.
    """
    config = preset_config(
        "k2-micro",
        tensor_model_parallel_size=torch.distributed.get_world_size(),
        sequence_parallel=sequence_parallel,
    )
    plain, delayed = _two_layers(config), _two_layers(config)
    delayed.load_state_dict(plain.state_dict(), strict=False)
    assert adopt_linears_(delayed, is_delayed=True) == 2
    found: dict[str, Any] = {"early": []}
    results = []
    for layers in (plain, delayed):
        generator = torch.Generator().manual_seed(5)
        layers.zero_grad()
        inputs = [torch.randn(8, 2, 128, generator=generator).requires_grad_() for _ in range(2)]
        outputs = [layers[1](layers[0](each)[0])[0] for each in inputs]
        for output in outputs:
            output.square().sum().backward()
        if layers is delayed:
            found["early"] = [name for name, p in layers.named_parameters() if p.grad is not None]
            for _ in outputs:
                layers[1].backward_dw()
                layers[0].backward_dw()
        results.append(
            [*outputs, *[i.grad for i in inputs], *[p.grad for p in layers.parameters()]]
        )
    found["equal"] = [torch.equal(left, right) for left, right in zip(*results, strict=True)]
    found["refusals"] = [_refusal(delayed[0])]
    delayed[0].weight.main_grad = torch.zeros_like(delayed[0].weight)
    delayed[1](delayed[0](inputs[0])[0])[0].sum().backward()
    found["refusals"].append(_refusal(delayed[0]))
    return found


def _two_layers(config: Any) -> torch.nn.ModuleList:
    shared: dict[str, Any] = dict(config=config, init_method=torch.nn.init.normal_, bias=False)
    return torch.nn.ModuleList(
        [
            ColumnParallelLinear(128, 64, gather_output=False, **shared),
            RowParallelLinear(64, 128, input_is_parallel=True, skip_bias_add=False, **shared),
        ]
    )


def _refusal(layer: Any) -> str:
    try:
        layer.backward_dw()
    except RuntimeError as error:
        return str(error)
    return ""


def validated_arguments(argv: list[str]) -> dict[str, Any] | str:
    """Parse and validate a command line as the stock script does; return what came of two flags."""
    import sys

    from megatron.training.arguments import parse_args, validate_args

    before, sys.argv = sys.argv, ["pretrain_gpt.py", *argv]
    try:
        args = parse_args(None, False)
        validate_args(args)
    except (ValueError, AssertionError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv = before
    return {
        "overlap": args.overlap_moe_expert_parallel_comm,
        "delay": args.delay_wgrad_compute,
        "impl": args.transformer_impl,
    }
