"""Worker: trains a few steps from given weights and records what a kernel could get wrong.

``python -m megatron_k2.gpu_check.record OUT.pt ARGS...`` builds one rank of a training command
(planning/rank.py, so Megatron's own set-up, ``train_step`` and checkpoint loader), feeds it tokens
drawn from a seed on the CPU, and writes a recording: losses, gradient norms, outputs of attention,
experts chosen, largest logits, factors of QK-Clip, weights before and after. Names are those of
checkpoints, the same with and without Transformer Engine. ``--save DIR`` among ARGS keeps the
starting weights for other recordings to ``--load``. One process, the model whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_k2 import register
from megatron_k2.planning import rank as ranks

STEPS = 4
"""The first has the golden weights; by the fourth momenta, router biases and QK-Clip have acted."""
TOKEN_SEED = 20507


@dataclass(frozen=True)
class Recording:
    """What one run of ``STEPS`` steps did; tensors are on the CPU in fp32.

    Attributes:
        losses: nats a token, by step.
        grad_norms: by step, before clipping.
        attention: outputs of the attention layers in the first microbatch, [s, b, hidden].
        routes: experts chosen there, bool [tokens, experts].
        max_logits: by step, [layers, heads].
        clip_factors: of QK-Clip, likewise.
        before: weights at the start, by the names of checkpoints.
        after: at the end.
    """

    losses: list[float]
    grad_norms: list[float]
    attention: dict[str, Tensor]
    routes: dict[str, Tensor]
    max_logits: list[Tensor]
    clip_factors: list[Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(asdict(self), partial)
        partial.replace(path)


def load_recording(path: Path) -> Recording:
    """Read what ``Recording.save`` wrote."""
    return Recording(**torch.load(path, weights_only=True))


def record(command: Sequence[str]) -> Recording:
    """Build a rank, train it and return what happened.

    Args:
        command: arguments of ``megatron_k2.training.pretrain``, ``--optimizer muonclip`` among
            them; the device decides for the process.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    with ranks.command_line([*command, "--mock-data"]):
        register()
        args, container = ranks.parse()
    rank = ranks.build(args, container)
    try:
        if args.save:
            _save_start(rank)
        watch, before = Watch(rank.chunks[0]), weights(rank.chunks[0])
        batches = _batches(args)
        losses, norms, logits, factors = [], [], [], []
        for _ in range(STEPS):
            loss, norm = _train_step(rank, batches)
            clip = _clip_of(rank.optimizer)
            losses.append(loss)
            norms.append(norm)
            logits.append(clip.maxima.cpu())
            factors.append(clip.gamma.cpu())
        after = weights(rank.chunks[0])
        return Recording(
            losses, norms, watch.attention, watch.routes, logits, factors, before, after
        )
    finally:
        ranks.forget()
        torch.distributed.destroy_process_group()


class Watch:
    """Keeps what attention and routers give in the first microbatch."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.attention: dict[str, Tensor] = {}
        self.routes: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            place = "decoder." + name.partition("decoder.")[2]
            if name.endswith(".self_attention"):
                module.register_forward_hook(self._keeper(self.attention, place, 0))
            elif name.endswith(".mlp.router"):
                module.register_forward_hook(self._keeper(self.routes, place, 1))

    @staticmethod
    def _keeper(found: dict[str, Tensor], place: str, index: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            if place not in found:
                value = output[index].detach().cpu()
                found[place] = value.clone() if value.dtype == torch.bool else value.float()

        return keep


def weights(chunk: torch.nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by the names and in the shapes of checkpoints, fp32, on the CPU.

    Transformer Engine keeps a tensor an expert, the local path one for all: here they are alike.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    described = unwrap_model(chunk).sharded_state_dict()
    apply_factories(described)
    found: dict[str, Tensor] = {}
    for part in nested_values(described):
        if not isinstance(part, ShardedTensor):
            continue
        whole = found.setdefault(part.key, torch.zeros(part.global_shape))
        prepended = part.prepend_axis_num
        sizes = (1,) * prepended + tuple(part.data.shape)
        place = tuple(
            slice(start, start + size)
            for start, size in zip(part.global_offset, sizes, strict=True)
        )
        whole[place] = part.data.detach().float().cpu().view(sizes)
    return found


def _train_step(rank: ranks.TrainingRank, batches: Iterator[dict[str, Tensor]]) -> Any:
    """Run Megatron's ``train_step``; return the loss and the gradient norm."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training.training import train_step

    from megatron_k2.training.pretrain import forward_step

    losses, *_, norm, _, _ = train_step(
        forward_step, RerunDataIterator(batches), rank.chunks, rank.optimizer, rank.scheduler,
        get_model_config(rank.chunks[0]), get_forward_backward_func(), iteration=0,
    )  # fmt: skip
    return float(losses["lm loss"]), float(norm)


def _batches(args: Any) -> Iterator[dict[str, Tensor]]:
    """Yield microbatches of random tokens, the same on every device."""
    generator = torch.Generator().manual_seed(TOKEN_SEED)
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        row = torch.randint(args.vocab_size, (shape[0], shape[1] + 1), generator=generator)
        yield {
            "tokens": row[:, :-1].contiguous(),
            "labels": row[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }


def _clip_of(optimizer: Any) -> Any:
    """Return MuonClip's record of logits and factors."""
    return next(c for one in optimizer.instances if (c := one.optimizer.clip) is not None)


def _save_start(rank: ranks.TrainingRank) -> None:
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(1, rank.chunks, None, None, 0)


def main(argv: Sequence[str]) -> None:
    """Record a command into a file."""
    record(argv[1:]).save(Path(argv[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
