"""What the runner shows of a stage under way: a line now and then, made from what commands print.

Trainings print hundreds of lines a minute; of those the last figure of each ten seconds is shown.
Lines that begin with ``[word]`` are a tool's own summaries.
"""

from __future__ import annotations

import re
import sys
import time

from megatron_k2.training.launch import parse_iteration, parse_validation

EVERY_S = 10.0
WIDTH = 120  # of a line
_SUMMARY = re.compile(r"\[[a-z-]+\] |(?:  )?step +\d+")


def minutes(seconds: float) -> str:
    """Return a time as 3:07, or 1:02:30."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    short = f"{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
    return f"{hours}:{short}" if hours else short


class Shown:
    """Prints what is worth a line; give each line of a command to ``line``."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def line(self, text: str) -> None:
        """Show a line, or not."""
        now = parse_iteration(text)
        short = text.rstrip()
        if now is not None:
            loss = now.fields.get("lm loss")
            short = f"step {now.iteration}/{now.train_iters}"
            short += f"  loss {loss:.3f}" if loss is not None else ""
        elif found := parse_validation(text):
            short = f"held-out loss {found[1]:.3f} at step {found[0]}"
        elif not _SUMMARY.match(text):
            return
        is_step = short.lstrip().startswith("step")
        if is_step and time.monotonic() < self._next_s:
            return
        if is_step:
            self._next_s = time.monotonic() + EVERY_S
        print(f"    {re.sub(' +', ' ', short.strip())[:WIDTH]}", flush=True)


def say(text: str) -> None:
    """Print a line of the runner."""
    print(f"[life] {text}", file=sys.stdout, flush=True)
