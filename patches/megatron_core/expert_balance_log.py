"""The balance of the experts, among the MoE metrics that upstream reports.

``MoEMetricsTracker.report`` is called by the training loop with a fixed list of names; what else
was recorded is never reduced or written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[..., str]) -> Any:
    def report(self: Any, loss_scale: float, iteration: int, *args: Any, **kwargs: Any) -> str:
        """Report the experts' balance, then upstream's metrics; return both texts.

        Collective: upstream's, and one all-reduce over the pipeline group.
        """
        from megatron_k2.model.balance import report_balance

        balance = report_balance(self, iteration, *args, **kwargs)
        return original(self, loss_scale, iteration, *args, **kwargs) + balance

    return report


def _still_needed() -> bool:
    """The training loop still names the metrics it reports."""
    from megatron.training import training

    return "track_names=track_names" in inspect.getsource(training.training_log)


PATCH = Patch(
    id="expert-balance-log",
    target="megatron.core.transformer.moe.moe_logging:MoEMetricsTracker.report",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="31e50d166036",
    why="metrics other than upstream's own four are recorded but never reduced or written",
    upstream="megatron/training/training.py:2761",
    remove_when="the training loop reports every metric that was recorded",
    still_needed=_still_needed,
)
