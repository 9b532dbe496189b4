"""One line about a user's mistake that upstream notices, from the exception it raises.

Megatron checks its arguments with bare asserts. The statement that failed names the arguments, and
the frame it failed in holds them, so the line can name each flag with its value. Only looks at
tracebacks: nothing of Megatron is imported.
"""

from __future__ import annotations

import argparse
import linecache
import re
import traceback
from types import TracebackType

_CHECKS = (
    "megatron/training/arguments.py",
    "megatron/training/argument_utils.py",
    "megatron/core/transformer/transformer_config.py",
    "megatron/core/model_parallel_config.py",
    "megatron/core/tokenizers/",
)
"""Where upstream looks at what the user gave, before anything is built."""

_MISSING_STATE = re.compile(r"optimizer\.state\.(\w+)\.\S+ from model not in state dict")
"""torch's planner on a tensor that the checkpoint lacks (``checkpoint/default_planner.py``)."""

_NO_LAUNCHER = "environment variable MASTER_ADDR expected, but not set"
"""torch's rendezvous (``distributed/rendezvous.py`` _env_rendezvous_handler) without a launcher."""

REFUSALS = (AssertionError, ValueError, TypeError, FileNotFoundError)


def explain(error: BaseException) -> str | None:
    """Return what the user gave wrong, or None for an error that is not about the input.

    Args:
        error: as caught, with its traceback.
    """
    missing = _MISSING_STATE.search(str(error))
    if missing:
        return (
            f"--load: the checkpoint has no optimizer state {missing[1]!r}: another --optimizer "
            "saved it; --no-load-optim loads its weights alone"
        )
    if not isinstance(error, REFUSALS):
        return None
    if _NO_LAUNCHER in str(error):
        return (
            "no launcher started this process (MASTER_ADDR is not set); put `torchrun "
            "--nproc-per-node 1 -m` in the place of `python -m`"
        )
    frames = list(_frames(error.__traceback__))
    deepest = frames[-1][0].filename if frames else ""
    if isinstance(error, ValueError) and "/megatron_k2/" in deepest:
        return str(error)  # ours are about a user's input and name the flag themselves
    checks = [one for one in frames if any(check in one[0].filename for check in _CHECKS)]
    if not checks:
        return None
    summary, place = checks[-1]
    last, end = summary.lineno or 0, summary.end_lineno or summary.lineno or 0
    statement = " ".join(
        linecache.getline(summary.filename, line).strip() for line in range(last, end + 1)
    )
    message = " ".join(str(error).split()) or f"`{statement.removeprefix('assert ')}` does not hold"
    if "recompute_modules" in message and "Allowed modules" in message:
        message += ", and K2's 'moe_down_proj'"
    where = f"{summary.filename.rpartition('megatron/')[2]}:{summary.lineno}"
    args = place.tb_frame.f_locals.get("args")
    found = ""
    if isinstance(args, argparse.Namespace):
        names = dict.fromkeys(re.findall(r"\bargs\.(\w+)", statement))
        found = ", ".join(
            f"--{name.replace('_', '-')} {getattr(args, name)}"
            for name in names
            if hasattr(args, name)
        )
    return f"{message}{f'; found {found}' if found else ''} (Megatron, {where})"


def _frames(
    trace: TracebackType | None,
) -> list[tuple[traceback.FrameSummary, TracebackType]]:
    places = []
    at = trace
    while at is not None:
        places.append(at)
        at = at.tb_next
    return list(zip(traceback.extract_tb(trace), places, strict=True))
