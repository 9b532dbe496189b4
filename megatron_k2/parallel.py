"""The one adapter beside ``megatron.core.parallel_state``: the process groups of a run.

Groups that Megatron has are reached through ``get_pg_collection``; groups that it lacks and K2
needs live in a table of names and are created on first use by their members alone, destroyed with
the model-parallel state, and created anew after it is initialised again. Checks of a layout, which
need no process group, are in ``layouts.py`` and re-exported here. Upstream: megatron-core 0.19.2,
``core/parallel_state.py``. Left out: groups over other axes than those Megatron has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_k2.layouts import Layout, propose_pipeline_layout, validate_layout

__all__ = [
    "GROUP_RECIPES",
    "K2Groups",
    "Layout",
    "destroy_model_parallel",
    "get_pg_collection",
    "initialize_model_parallel",
    "is_fake_world",
    "k2_groups",
    "propose_pipeline_layout",
    "stage_places",
    "validate_layout",
]


@dataclass(frozen=True)
class GroupRecipe:
    """How a named group follows from one of Megatron's: over the same ranks, shared or its own."""

    base: str
    """Field of ProcessGroupCollection whose ranks the group has."""
    own: bool
    """True: a communicator of its own, so that its traffic never queues behind the base's."""
    why: str
    across: str | None = None
    """Field of ProcessGroupCollection: the group joins the base groups of all these ranks."""


GROUP_RECIPES: Mapping[str, GroupRecipe] = {
    "max_logit": GroupRecipe(
        "dp_cp", False, "maximum attention logits: over all data of the same heads and layers"
    ),
    "optimizer_exchange": GroupRecipe(
        "intra_dp_cp", True, "pieces of matrices to their homes and back", across="tp"
    ),
}


class K2Groups:
    """Named process groups, created lazily and tied to the current model-parallel state."""

    def __init__(self, recipes: Mapping[str, GroupRecipe] = GROUP_RECIPES) -> None:
        self._recipes = recipes
        self._groups: dict[str, ProcessGroup] = {}
        self._state: ProcessGroup | None = None

    def get(self, name: str) -> ProcessGroup:
        """Return this rank's group ``name``, creating it on first use.

        Collective on the first call for an ``own`` group: every member must call.

        Raises:
            ValueError: no recipe of that name.
            RuntimeError: model-parallel groups are not initialised, or lack the base group.
        """
        if name not in self._recipes:
            raise ValueError(f"process group {name!r} is not one of {', '.join(self._recipes)}")
        state = parallel_state.get_model_parallel_group(check_initialized=False)
        if state is None:
            raise RuntimeError(
                f"rank {_rank()}: group {name!r} asked for before initialize_model_parallel"
            )
        if state is not self._state:
            self.destroy()
            self._state = state
        if name not in self._groups:
            self._groups[name] = self._create(name)
        return self._groups[name]

    def members(self, name: str) -> list[list[int]]:
        """Return the global ranks of a group: those of each base group, in the order of ``across``.

        Collective over the ``across`` group: every rank of it must call.
        """
        recipe = self._recipes[name]
        ranks = torch.distributed.get_process_group_ranks(self._base(name, recipe.base))
        if recipe.across is None:
            return [ranks]
        across = self._base(name, recipe.across)
        if across.size() == 1:
            return [ranks]
        if is_fake_world():
            return [[place[0] for place in _places_by_order() if place[1] == rank]
                    for rank in range(across.size())]  # fmt: skip
        found: list[list[int]] = [[]] * across.size()
        torch.distributed.all_gather_object(found, ranks, group=across)
        return found

    def _base(self, name: str, field: str) -> ProcessGroup:
        base = getattr(get_pg_collection([field]), field)
        if base is None:
            raise RuntimeError(f"rank {_rank()}: group {name!r} needs Megatron's {field!r} group")
        return cast("ProcessGroup", base)

    def _create(self, name: str) -> ProcessGroup:
        recipe = self._recipes[name]
        base = self._base(name, recipe.base)
        if not recipe.own:
            return base
        # Only members synchronise, so stages that never need the group need not call.
        group = torch.distributed.new_group(
            sorted(rank for ranks in self.members(name) for rank in ranks),
            backend=torch.distributed.get_backend(base),
            use_local_synchronization=True,
            group_desc=f"k2_{name}",
        )
        assert isinstance(group, ProcessGroup), "this rank is a member of its own group"
        return group

    def destroy(self) -> None:
        """Destroy the groups of our own and forget the shared ones; safe to call at any time."""
        live = torch.distributed.distributed_c10d._world.pg_map
        for name, group in self._groups.items():
            if self._recipes[name].own and group in live:
                torch.distributed.destroy_process_group(group)
        self._groups.clear()
        self._state = None


k2_groups = K2Groups()

Place = tuple[int, int, int, int, int, int]
"""(global rank, rank in tp, in dp_cp, in ep, in expert tp, in expert dp)."""


def stage_places() -> list[Place]:
    """Return the place of every rank of this pipeline stage, in the order of global ranks.

    Collective: over the group ``optimizer_exchange``. In a fake world, where nobody answers, the
    places are those of Megatron's standard order.
    """
    if is_fake_world():
        return _places_by_order()
    pgs = get_pg_collection()
    own = (
        _rank(), pgs.tp.rank(), pgs.intra_dp_cp.rank(), pgs.ep.rank(), pgs.expt_tp.rank(),
        pgs.intra_expt_dp.rank(),
    )  # fmt: skip
    if pgs.tp.size() * pgs.intra_dp_cp.size() == 1:
        return [own]
    group = k2_groups.get("optimizer_exchange")
    places = [own] * group.size()
    torch.distributed.all_gather_object(places, own, group=group)
    return places


def is_fake_world() -> bool:
    """Whether the default process group moves no data (``--fake-process-group``)."""
    return torch.distributed.is_initialized() and torch.distributed.get_backend() == "fake"


def _places_by_order() -> list[Place]:
    """Compute ``stage_places`` from sizes alone (``parallel_state.py:859`` and ``:887``)."""
    pgs, order = get_pg_collection(), "tp-cp-ep-dp-pp"
    sizes = dict(pp=pgs.pp.size(), order=order)
    dense = parallel_state.RankGenerator(
        tp=pgs.tp.size(), ep=1, dp=pgs.dp.size(), cp=pgs.cp.size(), **sizes
    )
    experts = parallel_state.RankGenerator(
        tp=pgs.expt_tp.size(), ep=pgs.ep.size(), dp=pgs.expt_dp.size(), cp=1, **sizes
    )
    axes = ((dense, "tp"), (dense, "dp-cp"), (experts, "ep"), (experts, "tp"), (experts, "dp"))
    within = [
        {rank: at for ranks in maker.get_ranks(axis) for at, rank in enumerate(ranks)}
        for maker, axis in axes
    ]
    stage = next(ranks for ranks in dense.get_ranks("tp-cp-dp") if _rank() in ranks)
    return [(rank, *(found[rank] for found in within)) for rank in sorted(stage)]  # type: ignore[misc]


def get_pg_collection(required: list[str] | None = None) -> ProcessGroupCollection:
    """Return Megatron's current groups (all, or the ``required`` fields) as one collection."""
    return ProcessGroupCollection.use_mpu_process_groups(required)


def initialize_model_parallel(**sizes: Any) -> ProcessGroupCollection:
    """Create Megatron's groups and return them. ``sizes`` as upstream's function takes them.

    Collective: every rank of the default group must call.
    """
    parallel_state.initialize_model_parallel(**sizes)
    return get_pg_collection()


def destroy_model_parallel() -> None:
    """Destroy our groups, then Megatron's. The default process group stays."""
    k2_groups.destroy()
    parallel_state.destroy_model_parallel()


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
