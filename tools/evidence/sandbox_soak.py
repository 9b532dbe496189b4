"""Eight sandboxes at once for minutes: nothing is left of them.

Programs that end, fail, loop, fork, fill memory, disk and output, and leave daemons behind, each
drawn at random. Before and after, and every minute, it counts this process's descriptors, memory
and children, the machine's processes, and entries of /tmp, /dev/shm and System V memory.

Examples:
    .venv/bin/python tools/evidence/sandbox_soak.py --minutes 10
    .venv/bin/python tools/evidence/sandbox_soak.py --minutes 1 --kind bubblewrap --output soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_k2.gym.sandbox.base import Command, Limits, SandboxError
from megatron_k2.gym.sandbox.find import find_sandbox
from megatron_k2.gym.sandbox.local import LocalSandbox

PROGRAMS = {
    "ends": "print(sum(range(10000)))",
    "fails": "raise SystemExit(3)",
    "loops": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
    "daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
    "  time.sleep(600)\n os._exit(0)",
    "forks": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "disk": "n = 0\nwhile True:\n n += 1\n open(str(n), 'wb').write(bytes(1 << 20))",
    "output": "while True: print('x' * 1000)",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "cancelled": "import time\ntime.sleep(60)",
}
WEIGHTS = [8, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]
LIMITS = Limits(wall_s=1.5, cpu_s=0.5, memory_bytes=96 << 20, num_processes=16, disk_bytes=8 << 20)
OURS = ("k2-sandbox-", "k2-probe-")  # folders in /tmp
MEMORY_SLACK = 32 << 20  # of this process; Python keeps what it once had
SETTLE_S = 3.0  # other processes of the machine come and go


def main() -> None:
    """Run; exit with 1 if something is left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--parallel", type=int, default=8, help="sandboxes at once")
    parser.add_argument("--kind", default="auto", help="of sandbox")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    report = asyncio.run(soak(options))
    text = json.dumps(report, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    print("nothing is left" if not report["left"] else f"LEFT: {report['left']}")
    sys.exit(bool(report["left"]))


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run programs until the time is over; return what was before and after."""
    draw = random.Random(options.seed)
    sandbox = await find_sandbox(options.kind, num_parallel=options.parallel)
    assert isinstance(sandbox, LocalSandbox)
    await asyncio.gather(*(sandbox.run(Command(("python", "-c", "pass"))) for _ in range(8)))
    outcomes: Counter[str] = Counter()
    before, began = count(), time.monotonic()
    history = [before]

    async def worker() -> None:
        while time.monotonic() - began < 60 * options.minutes:
            (name,) = draw.choices(list(PROGRAMS), WEIGHTS)
            outcomes[f"{name}: {await once(sandbox, name)}"] += 1

    async def clock() -> None:
        while True:
            await asyncio.sleep(60)
            history.append(count())
            last = history[-1]
            words = f"{sum(outcomes.values())} runs, memory {last['memory_bytes'] >> 20} MB"
            print(f"{time.monotonic() - began:.0f} s: {words}", file=sys.stderr, flush=True)

    ticking = asyncio.ensure_future(clock())
    await asyncio.gather(*(worker() for _ in range(options.parallel)))
    ticking.cancel()
    await asyncio.sleep(SETTLE_S)
    after = count()
    await sandbox.close()
    return {
        "backend": sandbox.backend,
        "minutes": options.minutes,
        "parallel": options.parallel,
        "runs": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "before": before,
        "after": after,
        "left": left(before, after),
        "most_memory_bytes": max(one["memory_bytes"] for one in history),
        "command": " ".join(["python", *sys.argv]),
    }


async def once(sandbox: LocalSandbox, name: str) -> str:
    """Run a program; return how it ended."""
    work = asyncio.ensure_future(
        sandbox.run(Command(("python", "-c", PROGRAMS[name]), limits=LIMITS))
    )
    if name == "cancelled":
        await asyncio.sleep(0.3)
        work.cancel()
    try:
        return (await work).outcome
    except asyncio.CancelledError:
        return "cancelled"
    except SandboxError as error:
        return f"error {error}"


def count() -> dict[str, Any]:
    """Count what a sandbox could leave behind."""
    status = Path("/proc/self/status").read_text().split()
    ours = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        ours += any(program.encode() in text for program in PROGRAMS.values())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": len(children),
        "programs": ours,
        "memory_bytes": int(status[status.index("VmRSS:") + 1]) << 10,
        "tmp": len([name for name in os.listdir("/tmp") if name.startswith(OURS)]),
        "dev_shm": len(os.listdir("/dev/shm")),
        "system_v": len(Path("/proc/sysvipc/shm").read_text().splitlines()),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
    }


def left(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what grew."""
    grown = {name: [before[name], after[name]] for name in before if after[name] > before[name]}
    if after["memory_bytes"] - before["memory_bytes"] <= MEMORY_SLACK:
        grown.pop("memory_bytes", None)
    return grown


if __name__ == "__main__":
    main()
