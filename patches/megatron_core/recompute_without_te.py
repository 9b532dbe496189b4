"""Output-discarding recomputation without Transformer Engine.

``CheckpointWithoutOutput`` takes its default ``fp8=False`` for "asked for" (it tests ``is not
None``) and then reads Transformer Engine's FP8 state, a name that does not exist without it:
``--recompute-modules layernorm`` ends in a NameError on the local path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[..., None]) -> Any:
    def __init__(self: Any, fp8: Any = False) -> None:
        """Keep FP8 state only where there is one."""
        from megatron.core.tensor_parallel import random

        original(self, fp8 if hasattr(random, "FP8GlobalStateManager") else None)

    return __init__


def _still_needed() -> bool:
    """Upstream still takes False for a request."""
    return "self.fp8 = fp8 is not None" in inspect.getsource(PATCH.original())


PATCH = Patch(
    id="recompute-without-te",
    target="megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="72036565b771",
    why="recomputing norms fails without Transformer Engine: NameError FP8GlobalStateManager",
    upstream="megatron/core/tensor_parallel/random.py:740",
    remove_when="CheckpointWithoutOutput tests fp8 for truth",
    still_needed=_still_needed,
)
