"""What a rank puts on the wire: every collective and message of a region, with its process group.

``WireLog`` is a dispatch mode, so that it sees the calls of any module, upstream's among them, in
the backward pass too, on gloo, NCCL and a fake process group alike: a plan and a real run are
counted by the same code. A message to oneself (a group of one) is not logged. What a rank sends
follows from the call's tensors by the usual bandwidth-optimal algorithms (ring reductions and
gathers: (n - 1) / n of the whole for each pass); barriers and stores count nothing. Left out:
messages that do not pass c10d, such as shared memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


@dataclass(frozen=True)
class Message:
    """One call.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send, receive.
        ranks: global ranks of its group.
        group: the group's description (Megatron's name of the axis).
        given_bytes: of this rank's input; of a broadcast, of the tensor.
        own_bytes: of an all-to-all, what this rank sends itself.
    """

    kind: str
    ranks: tuple[int, ...]
    group: str
    given_bytes: int
    own_bytes: int = 0

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave this rank: ring algorithms; half of a pass of a broadcast's ring."""
        others = len(self.ranks) - 1
        share = others / len(self.ranks)
        return {
            "all-reduce": 2 * share * self.given_bytes,
            "all-gather": others * self.given_bytes,
            "reduce-scatter": share * self.given_bytes,
            "all-to-all": self.given_bytes - self.own_bytes,
            "broadcast": share * self.given_bytes,
            "send": self.given_bytes,
            "receive": 0,
        }[self.kind]


class WireLog(TorchDispatchMode):
    """Context that logs this process's calls in ``messages``."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Log a c10d call and run it; run any other operation."""
        if func.namespace == "c10d":
            self.log(func, args)
        return func(*args, **(kwargs or {}))

    def log(self, func: Any, args: Any) -> None:
        """Add one c10d call, if it moves anything."""
        message = message_of(func, args)
        if message is not None and len(message.ranks) > 1:
            self.messages.append(message)


def message_of(func: Any, args: Any) -> Message | None:
    """Read a c10d operator's call; None for one that moves no data.

    Raises:
        NotImplementedError: a data-moving operator that is not known here, named.
    """
    name = func._schema.name.removeprefix("c10d::")
    kind = _KINDS.get(name)
    if kind is None:
        if name in ("barrier", "monitored_barrier_"):
            return None
        raise NotImplementedError(f"c10d.{name} is not counted: add it to {__name__}")
    group = next(_group(arg) for arg in args if _is_group(arg))
    # Of gathers and scatters the second argument is what this rank gives.
    has_output = kind in ("all-gather", "reduce-scatter", "all-to-all")
    given = _nbytes(args[1 if has_output else 0])
    ranks = tuple(dist.get_process_group_ranks(group))
    own = _own_bytes(args, group, given) if kind == "all-to-all" else 0
    return Message(kind, ranks, group.group_desc, given, own)


def _is_group(value: Any) -> bool:
    return isinstance(value, dist.ProcessGroup) or "ProcessGroup" in str(
        getattr(value, "_type", lambda: "")()
    )


def _group(value: Any) -> dist.ProcessGroup:
    return value if isinstance(value, dist.ProcessGroup) else dist.ProcessGroup.unbox(value)


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _own_bytes(args: Any, group: dist.ProcessGroup, given: int) -> int:
    """Return what a rank of an all-to-all sends itself."""
    source, rank = args[1], group.rank()
    if not isinstance(source, Tensor):
        return int(source[rank].nbytes)
    splits = args[4]
    if not splits:
        return given // group.size()
    return int(splits[rank] * (given // max(source.shape[0], 1)))


def sent_bytes_by(messages: Iterable[Message]) -> dict[tuple[str, str], float]:
    """Return bytes sent by (group, kind)."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for one in messages:
        if one.kind != "receive":
            total[one.group, one.kind] += one.sent_bytes
    return dict(total)
