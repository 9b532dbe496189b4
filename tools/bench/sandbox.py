"""Sandbox: start-up over a bare subprocess, of each kind that is installed and holds here.

A Python program that does nothing, run ``--repeats`` times by turns with ``subprocess``, both with
the same interpreter. The medians count what else the machine does, for both; the fastest of each
do not. ``first`` is the run that also starts the process that later ones are forked from.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from report import print_json, print_table

from megatron_k2.gym.sandbox.base import Command, SandboxError
from megatron_k2.gym.sandbox.find import candidates, try_to_get_out
from megatron_k2.gym.sandbox.local import LocalSandbox

PROGRAM = Command(("python", "-c", "pass"))
COLUMNS = ("first_ms", "median_ms", "bare_ms", "over_ms", "fastest_over_ms")
BAR_MS = 100.0  # the issue's, of the median over a bare subprocess


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.repeats))
    header = ["sandbox", "first ms", "median ms", "bare ms", "over ms", "fastest over ms", "ratio"]
    header.append(f"over < {BAR_MS:.0f}")
    cells = [
        [
            row["sandbox"],
            *(f"{row[name]:.1f}" for name in COLUMNS),
            f"{row['median_ms'] / row['bare_ms']:.1f}",
            "yes" if row["over_ms"] < BAR_MS else "NO",
        ]
        for row in rows
    ]
    print_table(f"start-up of a sandbox, load {os.getloadavg()[0]:.1f}", header, cells)
    print_json(rows=rows, load=os.getloadavg()[0])


async def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each kind."""
    rows = []
    for kind in candidates("auto"):
        sandbox = LocalSandbox(kind)
        try:
            first = await once(sandbox)
            await try_to_get_out(sandbox)
            ours, bare = [], []
            for _ in range(repeats):
                ours.append(await once(sandbox))
                bare.append(once_bare())
        except SandboxError as error:
            print(f"{kind.name} does not hold here: {error}", file=sys.stderr)
            continue
        finally:
            await sandbox.close()
        median, plain = statistics.median(ours), statistics.median(bare)
        rows.append(
            {
                "sandbox": kind.name,
                "first_ms": first,
                "median_ms": median,
                "bare_ms": plain,
                "over_ms": median - plain,
                "fastest_over_ms": min(ours) - min(bare),
            }
        )
    return rows


async def once(sandbox: LocalSandbox) -> float:
    """Run the program; return milliseconds."""
    began = time.perf_counter()
    result = await sandbox.run(PROGRAM)
    assert result.outcome == "exited" and result.returncode == 0, result
    return 1e3 * (time.perf_counter() - began)


def once_bare() -> float:
    """Run the program without a sandbox; return milliseconds."""
    began = time.perf_counter()
    subprocess.run([os.path.realpath(sys.executable), "-c", "pass"], env={}, check=True)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
