"""``megatron-k2 doctor``: this environment; or a downloaded release (``--release``).

examples:
  # what is installed, which features that enables, what is wrong and the line that mends it
  doctor.py
  # without importing torch or trying a sandbox: a second instead of half a minute
  doctor.py --only base extras machine
  # is there room for 40 GB of checkpoints?
  doctor.py --only machine --folder /scratch/runs --disk-gb 40
  # a download, compared with everything that this package assumes of it; nothing of it is run
  doctor.py --release Kimi-K2-Instruct
  doctor.py --release Moonlight-16B-A3B-Instruct --k2-preset moonlight-16b-a3b

Ends with 0 if nothing is broken (or differs), 1 if something is, 2 for a wrong command line. What
is optional and not installed is no fault; what is installed and does not work is one.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_k2 import __version__
from megatron_k2.doctor.finding import Finding, as_json, as_text, num_broken
from megatron_k2.doctor.machine import check_machine, check_sandbox
from megatron_k2.doctor.requirements import check_base, check_extras
from megatron_k2.doctor.upstream import check_upstream
from megatron_k2.presets import list_presets

DISK_GB = 1.0  # a round figure, not measured: below it no run is worth starting
TIMEOUT_S = 600.0  # imports from a cold network disk take minutes
TRYING = "importing torch, Megatron and all the rest: half a minute, minutes from a cold disk"
PARTS = ("base", "upstream", "extras", "sandbox", "machine")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add = parser.add_argument_group("this environment").add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to look at; default: all")
    add("--folder", type=Path, default=Path("."), help="where runs write (the present folder)")
    add(
        "--disk-gb", type=float, default=DISK_GB, metavar="GB",
        help=f"free space wanted there, in 10^9 bytes ({DISK_GB:g})",
    )  # fmt: skip
    add(
        "--timeout-s", type=float, default=TIMEOUT_S, metavar="S",
        help=f"for imports to come back ({TIMEOUT_S:g})",
    )  # fmt: skip
    add = parser.add_argument_group("a downloaded release").add_argument
    add("--release", type=Path, metavar="DIR", help="the download")
    add("--k2-preset", choices=list_presets(), default="kimi-k2", help="what it should be")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Look, print what was found; return the exit status."""
    args = build_parser().parse_args(argv)
    if args.release is not None:
        from megatron_k2.checkpoint import doctor

        flags = ["--release", str(args.release), "--k2-preset", args.k2_preset]
        return doctor.main([*flags, *(["--json"] if args.json else [])])
    if not args.json and "upstream" in args.only:
        print(TRYING, file=sys.stderr, flush=True)
    findings = examine(args.only, args.folder, args.disk_gb, args.timeout_s)
    head = f"megatron-k2 {__version__}, Python {platform.python_version()} ({sys.executable})"
    print(as_json(head, findings) if args.json else as_text(head, findings))
    return 1 if num_broken(findings) else 0


def examine(parts: Sequence[str], folder: Path, disk_gb: float, timeout_s: float) -> list[Finding]:
    """Return what is found of the parts, in the order of ``PARTS``."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "base": check_base,
        "upstream": lambda: check_upstream(timeout_s),
        "extras": check_extras,
        "sandbox": check_sandbox,
        "machine": lambda: check_machine(folder, disk_gb),
    }
    return [finding for part in PARTS if part in parts for finding in checks[part]()]
