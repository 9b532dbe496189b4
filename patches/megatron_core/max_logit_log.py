"""The logged maximum attention logit, taken from K2's own record.

Upstream's ``clip_qk`` reads Transformer Engine's rounded maxima, reaches through two wrappers that
an fp32 model does not have, and reduces layer by layer. For a model of K2's core attention the
value comes from the chunk's static buffer with one scalar reduction; other models, and clipping
itself, go to the original. Upstream writes the value to TensorBoard only; the second patch puts the
largest one since the last line into the iteration line as well, with MuonClip's own figures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.patches.patch import Patch

_LINE = "max attention logit"


def _replacement(original: Callable[..., float]) -> Any:
    def clip_qk(model: list[torch.nn.Module], log_max_only: bool = False) -> float:
        """Return the step's largest softmax input over all ranks, heads and layers; resets it.

        Collective: all-reduce (MAX) of one scalar over the default group - every rank must call.
        """
        from megatron.core.utils import get_model_config

        from megatron_k2.max_logit import bind_max_logit_buffer, reset_max_logits

        records = getattr(get_model_config(model[0]), "k2_max_attention_logit", False)
        if not (log_max_only and records):
            return original(model, log_max_only=log_max_only)
        device = next(model[0].parameters()).device
        largest = torch.full((), -torch.inf, device=device)
        for chunk in model:
            buffer = bind_max_logit_buffer(chunk)
            if buffer.numel():
                largest = torch.maximum(largest, buffer.max())
                reset_max_logits(chunk)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.item()

    return clip_qk


def _with_max_in_line(original: Callable[..., bool]) -> Any:
    def training_log(
        loss_dict: dict[str, Any], total: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        """Log an iteration; the line also holds the largest logit since the last line."""
        # Positions after total_loss_dict: learning rate, iteration, loss scale, memory flag,
        # skipped, gradient norm, parameter norm, zeros, maximum logit.
        iteration = args[1] if len(args) > 1 else kw["iteration"]
        largest = args[8] if len(args) > 8 else kw.get("max_attention_logit")
        if largest:
            _show(total, _LINE, largest, max)
        for name, value in _optimizer_figures(iteration).items():
            _show(total, name, value, lambda before, now: now)
        return original(loss_dict, total, *args, **kw)

    return training_log


def _show(
    total: dict[str, Any], name: str, value: float, join: Callable[[float, float], float]
) -> None:
    """Have the iteration line print a value; it prints means over the iterations since the last."""
    iterations = total.get("advanced iterations", 0)
    before = float(total.get(name, 0.0)) / max(1, iterations)
    total[name] = torch.tensor([join(before, value) * (iterations + 1)])


def _optimizer_figures(iteration: int) -> dict[str, float]:
    """Write MuonClip's figures to TensorBoard where it measured them; return those for the line.

    Collective: ``telemetry.report``'s, on every rank in the same iterations.
    """
    from megatron.training.global_vars import get_args, get_tensorboard_writer

    from megatron_k2.optimizer import telemetry

    args = get_args()
    interval = getattr(args, "k2_log_optimizer_interval", None)
    optimizer = telemetry.live() if telemetry.live is not None else None
    if not getattr(args, "k2_is_muonclip", False) or not interval or optimizer is None:
        return {}
    if iteration % interval:
        return {}
    figures = optimizer.report(args.num_layers + (args.mtp_num_layers or 0))
    writer = get_tensorboard_writer()
    if writer:
        for tag, value in figures.items():
            writer.add_scalar(tag, value, iteration)
    shown = {"heads clipped": "k2/heads-clipped", "expert update rms": "k2/update-rms/experts"}
    return {name: figures[tag] for name, tag in shown.items() if tag in figures}


def _line_lacks_it() -> bool:
    """The iteration line still has no maximum logit."""
    return "max attention logit" not in inspect.getsource(PATCHES[1].original())


def _still_needed() -> bool:
    """Upstream still reaches through exactly two wrappers."""
    return "model_chunk.module.module.decoder" in inspect.getsource(PATCHES[0].original())


_RANGE = {"distribution": "megatron-core", "min_version": "0.19.0", "max_version": "0.19.2"}

PATCHES = (
    Patch(
        id="max-logit-log",
        target="megatron.training.training:clip_qk",
        replacement=_replacement,
        fingerprint="283de8583076",
        why="upstream's log of the maximum logit fails without bf16 and without Transformer Engine",
        upstream="megatron/core/optimizer/qk_clip.py:8",
        remove_when="upstream reads maxima from any core attention",
        still_needed=_still_needed,
        importers=None,
        **_RANGE,
    ),
    Patch(
        id="max-logit-line",
        target="megatron.training.training:training_log",
        replacement=_with_max_in_line,
        fingerprint="5e34a182d566",
        why="the maximum logit goes to TensorBoard only; the iteration line should show it",
        upstream="megatron/training/training.py:2753",
        remove_when="upstream prints the maximum logit",
        still_needed=_line_lacks_it,
        **_RANGE,
    ),
)
