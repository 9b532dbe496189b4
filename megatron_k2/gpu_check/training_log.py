"""What a training printed, as figures: losses, speed, memory, logits; and the figures of a run.

Reads Megatron's own lines (training/launch.py knows the iteration's). The loss that a fresh model
should print is known beforehand: with logits of variance ``hidden * std^2`` it is the logarithm of
the vocabulary and half of that variance (k2-micro at a standard deviation of 0.1: 6.878 expected,
6.878 found on a CPU).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_k2.gpu_check.check import Bound, Failed, Figure
from megatron_k2.presets import load_preset
from megatron_k2.training.launch import Iteration, parse_iteration

WARM_UP = 2  # first steps, which compile kernels and create buffers, count for no speed
_MEMORY = re.compile(r"memory \(MB\).*?max allocated: ([\d.]+)")
_SAVED = re.compile(r"save-checkpoint[. ]*: \(([\d.]+), ([\d.]+)\)")
_MEGABYTE = 1 << 20

FIRST_LOSS = Bound(
    0.1, "logarithm of the vocabulary and half of the logits' variance; the norm's weights are 1"
)


@dataclass
class TrainingLog:
    """Of one training.

    Attributes:
        iterations: in order.
        max_allocated_bytes: of a GPU, the largest that was printed; on a CPU of the process.
        save_s: of every checkpoint, the slowest rank's.
    """

    iterations: list[Iteration] = field(default_factory=list)
    max_allocated_bytes: float = 0.0
    save_s: list[float] = field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by iteration, nats a token."""
        return {one.iteration: one.fields["lm loss"] for one in self.iterations}

    def median(self, name: str) -> float:
        """Return the median of a field of the iteration line after the warm-up; NaN without."""
        values = [one.fields[name] for one in self.iterations[WARM_UP:] if name in one.fields]
        return statistics.median(values) if values else math.nan

    def last(self, name: str) -> float:
        """Return a field of the last iteration line; NaN without."""
        return self.iterations[-1].fields.get(name, math.nan)


def read_training(text: str, num_iterations: int) -> TrainingLog:
    """Read what a training printed.

    Args:
        text: of all its processes.
        num_iterations: that must be there.

    Raises:
        Failed: fewer iterations were logged.
    """
    log = TrainingLog()
    for line in text.splitlines():
        if now := parse_iteration(line):
            log.iterations.append(now)
        elif found := _MEMORY.search(line):
            size = float(found.group(1)) * _MEGABYTE
            log.max_allocated_bytes = max(log.max_allocated_bytes, size)
        elif found := _SAVED.search(line):
            log.save_s.append(float(found.group(2)) / 1e3)
    if len(log.iterations) != num_iterations:
        raise Failed(f"{len(log.iterations)} of {num_iterations} iterations were logged")
    return log


def training_figures(
    log: TrainingLog, tokens_per_step: int, expected_first_loss: float
) -> list[Figure]:
    """Return loss, speed and logits of a training as figures."""
    step_s = log.median("elapsed time per iteration (ms)") / 1e3
    first = log.iterations[0].fields["lm loss"]
    figures = [
        Figure("first loss", first, "nats"),
        Figure("off the expected", abs(first - expected_first_loss), "nats", FIRST_LOSS),
        Figure("last loss", log.last("lm loss"), "nats"),
        Figure("last gradient norm", log.last("grad norm")),
        Figure("step", step_s, "s"),
        Figure("tokens", tokens_per_step / step_s, "tokens/s"),
        Figure("largest logit", log.last("max attention logit")),
        Figure("heads clipped", log.last("heads clipped")),
    ]
    if "throughput per GPU (TFLOP/s/GPU)" in log.iterations[-1].fields:
        speed = log.median("throughput per GPU (TFLOP/s/GPU)")
        figures.append(Figure("throughput", speed, "TFLOP/s a GPU"))
    return figures


def expected_first_loss(preset: str) -> float:
    """Return the loss of a preset's model that was just initialised, nats a token."""
    loaded = load_preset(preset)
    vocab_size, hidden_size, init_std = (
        float(loaded.value(name))  # type: ignore[arg-type]
        for name in ("vocab_size", "hidden_size", "init_method_std")
    )
    return math.log(vocab_size) + hidden_size * init_std**2 / 2


def largest_difference(found: Mapping[int, float], expected: Mapping[int, float]) -> float:
    """Return the largest distance of two series over the steps that both have.

    Raises:
        Failed: they have none in common.
    """
    steps: Sequence[int] = sorted(found.keys() & expected.keys())
    if not steps:
        raise Failed("the two runs have no step in common")
    differences = [abs(found[step] - expected[step]) for step in steps]
    return max(differences) if all(map(math.isfinite, differences)) else math.nan
