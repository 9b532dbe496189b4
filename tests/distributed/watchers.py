"""What a step does, counted: matrices, collectives, allocations, reads of the host."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_REDUCTIONS = {
    int(op): name for name, op in torch.distributed.ReduceOp.RedOpType.__members__.items()
}


class Counted:
    """An update rule that counts the matrices it is given, by shape."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.scale, self.flops = rule, rule.scale, rule.flops
        self.count = 0

    def __call__(self, momenta: torch.Tensor) -> torch.Tensor:
        """Count and pass on."""
        self.count += len(momenta)
        return self.rule(momenta)  # type: ignore[no-any-return]


class Collectives(TorchDispatchMode):
    """Logs what torch.distributed is asked for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Log and pass on."""
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name == "allreduce_":
                name += f" {_REDUCTIONS[int(args[2].op())]}"
            self.log.append(name)
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Follows the bytes of storages that are made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Any = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what is new."""
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Tensor):
                self.known.setdefault(one.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.untyped_storage() not in self.known:
                storage = one.untyped_storage()
                self.known[storage] = size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._gone, size)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: scalars read, and copies to the host."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a read, or a result on the host made of something on the device."""
        self.num_operations += 1
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in self.READS:
            self.found.append(str(func))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if any(one.is_cuda for one in given) and any(one.device.type == "cpu" for one in made):
            self.found.append(str(func))
        return result
