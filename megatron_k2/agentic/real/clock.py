"""Runs in the sandbox: a Python server whose ``datetime`` always says the same moment.

``python -c SOURCE MOMENT MODULE PACKAGE [ARGUMENT ...]``: MODULE's name ``datetime`` is replaced,
then PACKAGE is run as ``python -m`` does. So a dialogue with a server that tells the time is the
same at every run.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from datetime import datetime, tzinfo

MOMENT = datetime.fromisoformat(sys.argv[1])


class Fixed(datetime):
    """The moment, whenever it is asked."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        """Return the moment."""
        return MOMENT.astimezone(tz) if tz else MOMENT.replace(tzinfo=None)


importlib.import_module(sys.argv[2]).datetime = Fixed  # type: ignore[attr-defined]
sys.argv = [sys.argv[3], *sys.argv[4:]]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
