"""One engine over several ranks: tensor and expert parallelism, every rank the same steps.

The ranks that hold one copy of the model run the same core on the same requests and sum their
parts of each layer (forward.py). The first of them *leads*: it takes requests and, before each
step, sends what changed to the others, which ``follow``. What a step decides depends on commands
and token ids alone, and the ids are the leader's. Pipeline and context parallelism are refused by
``bind_weights``; copies of the model in other data-parallel ranks are engines of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_k2.engine.base import Piece, Request
from megatron_k2.engine.core import LocalCore, UnderWay
from megatron_k2.engine.forward import Reduce
from megatron_k2.engine.scheduler import Limits

Change = Callable[[int], None]


def engine_group(pg_collection: ProcessGroupCollection) -> ProcessGroup:
    """Return the ranks that hold one copy of the model: the wider of ``tp`` and ``tp_ep``.

    Raises:
        ValueError: pipeline stages, or groups of which neither holds the other.
    """
    if pg_collection.pp.size() > 1:
        raise ValueError(
            f"--pipeline-model-parallel-size {pg_collection.pp.size()}: the local engine holds all "
            "layers on a rank; use tensor or expert parallelism"
        )
    tp, experts = pg_collection.tp, pg_collection.tp_ep
    wide, narrow = (tp, experts) if tp.size() >= experts.size() else (experts, tp)
    members = [set(torch.distributed.get_process_group_ranks(one)) for one in (wide, narrow)]
    if not members[1] <= members[0]:
        raise ValueError(
            f"--tensor-model-parallel-size {tp.size()} and {experts.size()} ranks of experts "
            "(--expert-model-parallel-size x --expert-tensor-parallel-size): one must divide the "
            "other for the local engine"
        )
    return wide


class RankedCore(LocalCore):
    """A core whose steps all ranks of one model copy take together.

    The leader's ``add``, ``abort`` and the like are sent before its next step; the other ranks call
    ``follow`` and nothing else.

    Args:
        model: this rank's part.
        limits: the same on every rank.
        pg_collection: groups of the layout.
        change: changes this rank's weights to a version, for ``change_weights``.
        options: of ``LocalCore``.

    Collective: the constructor, and ``step`` with ``follow``, over ``engine_group``. A leader that
    is idle sends nothing, and followers wait no longer than the group's timeout.
    """

    def __init__(
        self,
        model: Any,
        limits: Limits,
        pg_collection: ProcessGroupCollection,
        *,
        change: Change | None = None,
        **options: Any,
    ) -> None:
        self._group, self._change = engine_group(pg_collection), change
        self._leader = torch.distributed.get_process_group_ranks(self._group)[0]
        self.is_leader = torch.distributed.get_rank() == self._leader
        self._commands: list[tuple[str, tuple[Any, ...]]] = []
        reduce = Reduce(pg_collection.tp, pg_collection.tp_ep)
        super().__init__(model, limits, reduce=reduce, share_ids=self._shared, **options)

    def add(self, request: Request) -> None:
        """Queue a request on every rank; see ``LocalCore.add``."""
        if request.sampling.seed is None:
            seed = random.SystemRandom().getrandbits(64)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        super().add(request)
        self._tell("add", request)

    def abort(self, request_id: str) -> None:
        """End a request on every rank; see ``LocalCore.abort``."""
        super().abort(request_id)
        self._tell("abort", request_id)

    def drop(self, request_id: str) -> None:
        """Drop a request on every rank; see ``LocalCore.drop``."""
        super().drop(request_id)
        self._tell("drop", request_id)

    def clear(self) -> None:
        """Forget all requests on every rank; see ``LocalCore.clear``."""
        super().clear()
        self._tell("clear")

    def change_weights(self, version: int, under_way: UnderWay = "keep") -> None:
        """Have every rank run its ``change`` for a version. The leader calls."""
        self._send([*self._take(), ("change", (version, under_way))])
        self._changed(version, under_way)

    def step(self) -> list[tuple[str, Piece]]:
        """Take a step with all ranks; see ``LocalCore.step``. The leader calls."""
        self._send([*self._take(), ("step", ())])
        return super().step()

    def release(self) -> None:
        """Let ``follow`` return on the other ranks; they call it again before the next step."""
        self._send([*self._take(), ("release", ())])

    def follow(self) -> None:
        """Take part in everything until the leader releases or closes."""
        does: dict[str, Callable[..., Any]] = {
            "add": super().add,
            "abort": super().abort,
            "drop": super().drop,
            "clear": super().clear,
            "step": super().step,
            "change": self._changed,
        }
        while True:
            for name, args in self._send([]):
                if name == "release":
                    return
                if name == "close":
                    super().close()
                    return
                does[name](*args)

    def close(self) -> None:
        """Close every rank; see ``LocalCore.close``."""
        self._send([("close", ())])
        super().close()

    def _changed(self, version: int, under_way: UnderWay) -> None:
        change = self._change
        if change is None:
            raise ValueError("this engine was built without a function that changes its weights")
        self.update_weights(version, lambda: change(version), under_way)

    def _tell(self, name: str, *args: Any) -> None:
        if self.is_leader:
            self._commands.append((name, args))

    def _take(self) -> list[tuple[str, tuple[Any, ...]]]:
        commands, self._commands = self._commands, []
        return commands

    def _send(self, commands: list[tuple[str, tuple[Any, ...]]]) -> list[tuple[str, Any]]:
        """Broadcast the leader's commands; return them. Collective over the engine's group."""
        box = [commands]
        torch.distributed.broadcast_object_list(box, src=self._leader, group=self._group)
        return box[0]

    def _shared(self, ids: list[int]) -> list[int]:
        """Return the leader's ids. Collective over the engine's group."""
        if self._group.size() == 1:
            return ids
        both = torch.tensor(ids, device=self.cache.pages[0].device)
        torch.distributed.broadcast(both, src=self._leader, group=self._group)
        found: list[int] = both.tolist()
        return found
