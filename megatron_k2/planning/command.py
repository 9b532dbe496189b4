"""``tools/plan.py``: what fits, how fast it can be at best, and which flags say so.

examples:
  tools/plan.py --k2-preset kimi-k2 --gpus 256 --cluster h800
  tools/plan.py --k2-preset kimi-k2 --gpus 512 --cluster h100 --top 5 --picture plan.png
  tools/plan.py --k2-preset moonlight-16b-a3b --gpus 16 --cluster h200 --seq-length 8192 \\
      --global-batch-size 512 --json plan.json
  tools/plan.py --k2-preset kimi-k2 --gpus 256 --tp 1 --pp 16 --ep 16 --vpp 2 --memory report

Each layout printed was built by Megatron itself, stage by stage, on the meta device under a fake
process group, from the command line that is printed. Times are bounds, not forecasts: GPU peaks, no
latency, nothing but matrix products and messages (megatron_k2/planning/README.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.planning import report
from megatron_k2.planning.cluster import Cluster, list_clusters, load_cluster
from megatron_k2.planning.dry_run import silence
from megatron_k2.planning.estimate import Estimate
from megatron_k2.planning.search import RESERVE_BYTES, Finalist, Model, finish, fits, search
from megatron_k2.planning.settings import MEMORY, OFFLOAD, candidates
from megatron_k2.planning.workers import Mapper, workers
from megatron_k2.presets import list_presets, load_preset

SIZES = ("tp", "pp", "vpp", "ep", "cp")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--k2-preset", required=True, metavar="NAME", help=", ".join(list_presets()))
    made.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    made.add_argument(
        "--cluster", default="h800", metavar="KIND|FILE",
        help=f"{', '.join(list_clusters())}, or a TOML file of the form of planning/clusters.toml",
    )  # fmt: skip
    made.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=NUMBER",
        help="change the cluster: memory_bytes=96e9 network_bandwidth=25e9",
    )  # fmt: skip
    made.add_argument("--seq-length", type=int, help="tokens; default: the preset's")
    made.add_argument("--global-batch-size", type=int, help="sequences; default: the preset's")
    made.add_argument("--micro-batch-size", type=int, nargs="+", default=[1])
    for name in SIZES:
        made.add_argument(f"--{name}", type=int, nargs="+", help="only these sizes")
    made.add_argument("--memory", nargs="+", choices=list(MEMORY), default=list(MEMORY))
    made.add_argument("--optimizer-offload", nargs="+", choices=OFFLOAD, default=list(OFFLOAD))
    made.add_argument("--fp8", action="store_true", help="experts in blockwise FP8")
    made.add_argument(
        "--reserve-gb", type=float, default=RESERVE_BYTES / 1e9,
        help="left free on each GPU for CUDA, NCCL and fragments (%(default)s)",
    )  # fmt: skip
    made.add_argument("--top", type=int, default=3, help="layouts to build and print (%(default)s)")
    made.add_argument("--workers", type=int, help="processes; default: one a core")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    made.add_argument(
        "--picture", type=Path, metavar="FILE", help="memory and timeline of the best"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; return 0, 1 if nothing fits, 2 for a wrong argument."""
    options = parser().parse_args(argv)
    try:
        with silence(), workers(options.workers) as mapper:
            cluster, model, finalists, found = _plan(options, mapper)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if not finalists:
        gpus = f"{cluster.num_gpus} {cluster.name}"
        print(f"plan: none of {found[1]} layouts fits {gpus}; see --help", file=sys.stderr)
        return 1
    _print(model, cluster, finalists, *found)
    if options.json:
        text = json.dumps(report.as_json(finalists, cluster), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.picture:
        report.draw(finalists[0], cluster, options.picture)
    return 0


def _plan(
    options: argparse.Namespace, mapper: Mapper
) -> tuple[Cluster, Model, list[Finalist], tuple[int, int, float]]:
    """Return cluster, model, the best layouts, and (how many fit, how many there are, seconds)."""
    start = time.monotonic()
    cluster = load_cluster(options.cluster, options.gpus, _changes(options.set))
    value = load_preset(options.k2_preset).value
    model = Model(options.k2_preset, mapper=mapper)
    every = candidates(
        options.gpus, model.shape,
        seq_length=options.seq_length or int(value("seq_length")),  # type: ignore[call-overload]
        global_batch_size=options.global_batch_size or int(value("global_batch_size", 1)),  # type: ignore[call-overload]
        node_gpus=cluster.node_gpus, memory=options.memory, offload=options.optimizer_offload,
        fp8=(options.fp8,), micro_batch_sizes=options.micro_batch_size,
    )  # fmt: skip
    for name in SIZES:
        if wanted := getattr(options, name):
            every = [one for one in every if getattr(one, name) in wanted]
    if not every:
        raise ValueError(
            f"no layout divides --gpus {options.gpus}, the model and --global-batch-size; give "
            "other sizes"
        )
    reserve = options.reserve_gb * 1e9
    found, number = search(model, cluster, every, reserve_bytes=reserve, progress=_progress)
    finalists = _finish(model, cluster, found, options.top, reserve)
    _progress("")
    return cluster, model, finalists, (len(found), number, time.monotonic() - start)


def _finish(
    model: Model, cluster: Cluster, found: Sequence[Estimate], top: int, reserve: float
) -> list[Finalist]:
    """Build the best that differ in more than memory settings; drop what does not fit after all."""
    done: list[Finalist] = []
    seen = set()
    for guess in found:
        one = guess.candidate
        if (one.tp, one.pp, one.ep, one.cp) in seen:
            continue
        _progress(f"building {report.name_of(guess)}")
        finalist = finish(model, cluster, guess)
        host = finalist.estimate.host_bytes
        if finalist.refusal or fits(finalist.peak_bytes, host, cluster, reserve):
            seen.add((one.tp, one.pp, one.ep, one.cp))
            done.append(finalist)
        if len(done) == top:
            break
    return sorted(done, key=lambda each: (bool(each.refusal), each.estimate.step_s))


def _print(
    model: Model,
    cluster: Cluster,
    finalists: Sequence[Finalist],
    fitting: int,
    number: int,
    seconds: float,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=200 if not sys.stdout.isatty() else None)
    title = (
        f"{model.preset} on {cluster.num_gpus} {cluster.name}: {fitting} of {number} layouts fit"
    )
    table = Table(title=f"{title} ({seconds:.0f} s)")
    for name in report.HEADER:
        table.add_column(name)
    for row in report.rows(finalists, cluster):
        table.add_row(*row)
    console.print(table)
    for one in finalists:
        print(f"\n# {report.name_of(one.estimate)}")
        print(f"torchrun ... -m megatron_k2.training.pretrain {shlex.join(one.command)}")


def _changes(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for one in given:
        name, _, number = one.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--set {one}: must be FIELD=NUMBER") from None
    if "node_gpus" in found:
        found["node_gpus"] = int(found["node_gpus"])
    return found


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
