"""The flags of ``tools/plan.py``: parsed, and checked before anything is traced."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_k2.inputs import positive_int
from megatron_k2.planning.cluster import list_clusters
from megatron_k2.planning.jobs import JOBS
from megatron_k2.planning.search import RESERVE_BYTES
from megatron_k2.planning.settings import MEMORY, OFFLOAD, USUAL
from megatron_k2.presets import list_presets

BATCH_PER_GPU = 8
"""Sequences of a step where neither job nor preset says."""

SIZES = ("tp", "pp", "vpp", "ep", "cp")


def parser(description: str) -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--k2-preset", required=True, metavar="NAME|FOLDER",
        help=f"{', '.join(list_presets())}, or a folder with a config.json",
    )  # fmt: skip
    jobs = "; ".join(f"{name}: {job.summary}" for name, job in JOBS.items())
    made.add_argument("--job", choices=list(JOBS), default="pretrain", help=jobs)
    made.add_argument("--gpus", type=positive_int, required=True, help="GPUs in all")
    made.add_argument(
        "--cluster", default="h800", metavar="KIND|FILE",
        help=f"{', '.join(list_clusters())}, or a TOML file of the form of planning/clusters.toml",
    )  # fmt: skip
    made.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=NUMBER",
        help="change the cluster: memory_bytes=96e9 network_bandwidth=25e9",
    )  # fmt: skip
    _add_layout(made.add_argument_group("training"))
    _add_engine(made.add_argument_group("serving and reinforcement learning"))
    made.add_argument(
        "--reserve-gb", type=float, default=RESERVE_BYTES / 1e9,
        help="left free on each GPU for CUDA, NCCL and fragments (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--top", type=positive_int, default=3,
        help="how many to build and print, each of other TP, PP, EP or CP (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--similar", action="store_true",
        help="print layouts too that differ in chunks, memory or offloading alone",
    )  # fmt: skip
    made.add_argument("--workers", type=positive_int, help="processes; default: one a core")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    made.add_argument(
        "--picture", type=Path, metavar="FILE",
        help="memory by stage and timeline of the best training layout",
    )  # fmt: skip
    return made


def _add_layout(group: Any) -> None:
    group.add_argument("--seq-length", type=positive_int, help="tokens; default: the preset's")
    group.add_argument(
        "--global-batch-size", type=positive_int,
        help=f"sequences; default: the job's or the preset's, else {BATCH_PER_GPU} a GPU",
    )  # fmt: skip
    group.add_argument("--micro-batch-size", type=positive_int, nargs="+", default=[1])
    for name in SIZES:
        group.add_argument(f"--{name}", type=positive_int, nargs="+", help="only these sizes")
    group.add_argument(
        "--etp", type=positive_int, nargs="+", default=[1],
        help="ranks that share an expert: 1 (default) or tp; each size is traced",
    )  # fmt: skip
    group.add_argument(
        "--memory", nargs="+", choices=list(MEMORY), default=list(USUAL),
        help="of activations: kept; recomputed in part; and stored in FP8 (compact); and the rest "
        "offloaded (report), all (host); or whole layers recomputed (full)",
    )  # fmt: skip
    group.add_argument("--optimizer-offload", nargs="+", choices=OFFLOAD, default=list(OFFLOAD))
    group.add_argument("--fp8", action="store_true", help="experts in blockwise FP8")


def _add_engine(group: Any) -> None:
    group.add_argument(
        "--prompt-length", type=positive_int, default=2048, help="tokens (%(default)s)"
    )
    group.add_argument(
        "--response-length", type=positive_int, default=2048, help="tokens (%(default)s)"
    )
    group.add_argument("--engine-weights", choices=("fp8", "bf16"), default="fp8")
    group.add_argument(
        "--engine-gpus", type=positive_int, metavar="N",
        help="GPUs of the engines, beside --gpus of the trainer; default: they share --gpus",
    )  # fmt: skip
    group.add_argument(
        "--slowest", type=float, default=0.0, metavar="TOKENS/S",
        help="least speed of a request; slower instances are left out",
    )  # fmt: skip


def check(options: argparse.Namespace) -> None:
    """Check what parsing cannot.

    Raises:
        ValueError: an argument is wrong or has no effect, named.
    """
    job = JOBS[options.job]
    if options.reserve_gb < 0:
        raise ValueError(f"--reserve-gb {options.reserve_gb} must not be negative")
    if options.engine_gpus and options.job != "rl":
        raise ValueError(f"--engine-gpus is for --job rl, not {options.job}")
    if options.picture and not job.trains:
        raise ValueError("--picture draws training layouts; --job serve has none")
    for flag, file in (("--json", options.json), ("--picture", options.picture)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{flag} {file}: there is no folder {file.absolute().parent}")
