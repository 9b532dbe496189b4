"""What trainer and engine must agree on before a rollout: version, checksums, log-probabilities.

Checksums are over Hugging Face names (live.py), so that they do not depend on any layout; the
engine's are of its own memory. Log-probabilities are of a fixed prompt (probe.py): they cover what
no checksum sees, such as a rotation table, an epsilon or a kernel, and are all there is of a server
that shows no weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

Top = tuple[tuple[int, float], ...]

TOLERANCE_NATS = {"F32": 1e-4, "BF16": 0.1}
"""Largest difference of a log-probability, by the dtype of the weights. F32: ten times what the
engine's tests hold it to. BF16: about 2^-8 relative of logits of some tens; not measured."""


class SyncRefused(RuntimeError):
    """The engine's weights are not shown to be the trainer's: nothing may be sampled from them."""


@dataclass(frozen=True)
class TensorSum:
    """A tensor's checksum (16 hex digits, see sums.py), and dtype and shape that it is of."""

    dtype: str
    shape: tuple[int, ...]
    value: str

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Fingerprint:
    """Of one side's weights.

    Attributes:
        version: of the weights.
        tensors: Hugging Face name to checksum; None: this side cannot show its weights.
        top: the prompt's beginnings, shortest first, to next tokens and log-probabilities, best
            first: several of the trainer's, one of the engine's.
    """

    version: int
    tensors: dict[str, TensorSum] | None
    top: tuple[Top, ...]

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Read ``to_json``'s text."""
        found = json.loads(text)
        tensors = {
            name: TensorSum(one["dtype"], tuple(one["shape"]), one["value"])
            for name, one in found["tensors"].items()
        }
        top = tuple(tuple((int(i), float(p)) for i, p in row) for row in found["top"])
        return cls(found["version"], tensors, top)


def differences(trainer: Fingerprint, engine: Fingerprint, tolerance_nats: float) -> list[str]:
    """Return where the engine's fingerprint is not the trainer's, a line each.

    Args:
        trainer: with its checksums and several tokens for each beginning.
        engine: with one token for each beginning; without checksums these are not compared.
        tolerance_nats: of log-probabilities.
    """
    found = []
    if trainer.version != engine.version:
        found.append(f"version: the trainer's is {trainer.version}, the engine's {engine.version}")
    if engine.tensors is not None:
        found += sum_differences(trainer.tensors or {}, engine.tensors)
    if len(trainer.top) != len(engine.top):
        found.append(f"log-probabilities: {len(trainer.top)} positions, {len(engine.top)} answers")
    for position, (wanted, answered) in enumerate(zip(trainer.top, engine.top, strict=False)):
        (token, log_prob), known = answered[0], dict(wanted)
        best = wanted[0][1]
        if token not in known or not (
            max(abs(known[token] - log_prob), abs(best - log_prob)) <= tolerance_nats
        ):
            found.append(
                f"log-probability at position {position}: the engine's best token is {token} with "
                f"{log_prob:.6f}, the trainer's {wanted[0][0]} with {best:.6f}, "
                f"more than {tolerance_nats:g} apart"
            )
    return found


def sum_differences(trainer: dict[str, TensorSum], engine: dict[str, TensorSum]) -> list[str]:
    """Return the names of tensors that are missing, too many or other, a line each."""
    found = [f"{name}: the engine has no such tensor" for name in trainer if name not in engine]
    found += [f"{name}: the trainer has no such tensor" for name in engine if name not in trainer]
    for name in trainer.keys() & engine.keys():
        ours, theirs = trainer[name], engine[name]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            found.append(
                f"{name}: {ours.dtype} {list(ours.shape)} in the trainer, {theirs.dtype} "
                f"{list(theirs.shape)} in the engine"
            )
        elif ours.value != theirs.value:
            found.append(f"{name}: checksum {ours.value} in the trainer, {theirs.value} elsewhere")
    return sorted(found)


def refuse_differences(problems: list[str], version: int, limit: int = 10) -> None:
    """Raise for a list of differences.

    Raises:
        SyncRefused: the list is not empty; names the first ``limit``.
    """
    if problems:
        more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
        lines = "\n  ".join([*problems[:limit], *more])
        raise SyncRefused(f"weights {version} are refused, no rollout:\n  {lines}")
