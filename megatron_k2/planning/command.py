"""``tools/plan.py``: what fits, how fast it can be at best, and which flags say so.

examples:
  tools/plan.py --k2-preset kimi-k2 --gpus 256 --cluster h800
  tools/plan.py --k2-preset kimi-k2 --gpus 512 --cluster h100 --top 5 --picture plan.png
  tools/plan.py --k2-preset moonlight-16b-a3b --gpus 16 --cluster h200 --seq-length 8192 \\
      --global-batch-size 512 --json plan.json
  tools/plan.py --k2-preset kimi-k2 --gpus 256 --tp 1 --pp 16 --ep 16 --vpp 2 --memory report
  tools/plan.py --job lora --k2-preset kimi-k2 --gpus 64 --cluster h200
  tools/plan.py --job serve --k2-preset kimi-k2 --gpus 32 --cluster h200 --prompt-length 8192
  tools/plan.py --job rl --k2-preset kimi-k2 --gpus 256 --cluster h800 --response-length 16384
  tools/plan.py --job rl --k2-preset kimi-k2 --gpus 256 --engine-gpus 128 --cluster h800

Each training layout printed was built by Megatron itself, stage by stage, on the meta device under
a fake process group, from the command line that is printed. Times are bounds, not forecasts: GPU
peaks, no latency, nothing but products, messages and copies (megatron_k2/planning/README.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.planning import report
from megatron_k2.planning.cluster import Cluster, list_clusters, load_cluster
from megatron_k2.planning.dry_run import silence
from megatron_k2.planning.estimate import Estimate
from megatron_k2.planning.jobs import JOBS
from megatron_k2.planning.model import Model
from megatron_k2.planning.picture import draw
from megatron_k2.planning.reinforcement import Cycle, cycle
from megatron_k2.planning.search import RESERVE_BYTES, Finalist, exact_sizes, finish, fits, search
from megatron_k2.planning.serving import Engine, Traffic, engines
from megatron_k2.planning.settings import MEMORY, OFFLOAD, candidates
from megatron_k2.planning.workers import Mapper, workers
from megatron_k2.presets import list_presets, load_preset

SIZES = ("tp", "pp", "vpp", "ep", "cp")


@dataclass
class Plan:
    """What was asked and what was found.

    Attributes:
        cluster: the trainer's, or the engine's where nothing is trained.
        layouts: how many there are.
        fitting: how many of them fit.
        finalists: the best, built.
        engines: instances, best first.
        traffic: what they are asked.
        cycles: of reinforcement learning, best first.
        seconds: that the plan took.
    """

    cluster: Cluster
    layouts: int = 0
    fitting: int = 0
    finalists: list[Finalist] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    traffic: Traffic | None = None
    cycles: list[Cycle] = field(default_factory=list)
    seconds: float = 0.0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--k2-preset", required=True, metavar="NAME", help=", ".join(list_presets()))
    jobs = "; ".join(f"{name}: {job.summary}" for name, job in JOBS.items())
    made.add_argument("--job", choices=list(JOBS), default="pretrain", help=jobs)
    made.add_argument("--gpus", type=int, required=True, help="GPUs in all")
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
    made.add_argument("--top", type=int, default=3, help="how many to print (%(default)s)")
    made.add_argument("--workers", type=int, help="processes; default: one a core")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    made.add_argument(
        "--picture", type=Path, metavar="FILE",
        help="memory by stage and timeline of the best training layout",
    )  # fmt: skip
    return made


def _add_layout(group: Any) -> None:
    group.add_argument("--seq-length", type=int, help="tokens; default: the preset's")
    group.add_argument("--global-batch-size", type=int, help="sequences; default: the job's")
    group.add_argument("--micro-batch-size", type=int, nargs="+", default=[1])
    for name in SIZES:
        group.add_argument(f"--{name}", type=int, nargs="+", help="only these sizes")
    group.add_argument(
        "--etp", type=int, nargs="+", default=[1],
        help="ranks that share an expert: 1 (default) or tp; each size is traced",
    )  # fmt: skip
    group.add_argument("--memory", nargs="+", choices=list(MEMORY), default=list(MEMORY))
    group.add_argument("--optimizer-offload", nargs="+", choices=OFFLOAD, default=list(OFFLOAD))
    group.add_argument("--fp8", action="store_true", help="experts in blockwise FP8")


def _add_engine(group: Any) -> None:
    group.add_argument("--prompt-length", type=int, default=2048, help="tokens (%(default)s)")
    group.add_argument("--response-length", type=int, default=2048, help="tokens (%(default)s)")
    group.add_argument("--engine-weights", choices=("fp8", "bf16"), default="fp8")
    group.add_argument(
        "--engine-gpus", type=int, metavar="N",
        help="GPUs of the engines, beside --gpus of the trainer; default: they share --gpus",
    )  # fmt: skip
    group.add_argument(
        "--slowest", type=float, default=0.0, metavar="TOKENS/S",
        help="least speed of a request; slower instances are left out",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; return 0, 1 if nothing fits, 2 for a wrong argument."""
    options = parser().parse_args(argv)
    job = JOBS[options.job]
    start = time.monotonic()
    try:
        with silence(), workers(options.workers) as mapper:
            plan = _plan(options, mapper)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    plan.seconds = time.monotonic() - start
    gpus = f"{plan.cluster.num_gpus} {plan.cluster.name}"
    if job.trains and not plan.finalists:
        print(f"plan: none of {plan.layouts} layouts fits {gpus}; see --help", file=sys.stderr)
        return 1
    if job.serves and not plan.engines:
        print(
            f"plan: no engine of {options.k2_preset} with {options.engine_weights} weights and one "
            f"request fits {gpus} (--gpus, --engine-weights, --slowest)",
            file=sys.stderr,
        )
        return 1
    _print(f"{options.k2_preset}, {options.job}, {gpus}", plan)
    if options.json:
        options.json.write_text(json.dumps(_as_json(plan), indent=1) + "\n", encoding="utf-8")
    if options.picture and plan.finalists:
        draw(plan.finalists[0], plan.cluster, options.picture)
    return 0


def _plan(options: argparse.Namespace, mapper: Mapper) -> Plan:
    """Return what was asked for.

    Raises:
        ValueError: an argument is wrong, named.
    """
    job = JOBS[options.job]
    cluster = load_cluster(options.cluster, options.gpus, _changes(options.set))
    plan = Plan(cluster)
    reserve = options.reserve_gb * 1e9
    if job.trains:
        trained = Model(options.k2_preset, job.flags, mapper)
        _plan_training(options, trained, plan, reserve)
    if job.serves and (plan.finalists or not job.trains):
        answers = plan.finalists[0].estimate.candidate.global_batch_size if job.trains else None
        apart = options.engine_gpus if job.trains else None
        where = load_cluster(options.cluster, apart or options.gpus, _changes(options.set))
        plan.traffic = Traffic(
            options.prompt_length, options.response_length, options.engine_weights, answers
        )
        served = Model(options.k2_preset, mapper=mapper)
        found = engines(served, where, plan.traffic, reserve_bytes=reserve, progress=_progress)
        plan.engines = [one for one in found if 1 / one.decode_s >= options.slowest][: options.top]
        plan.cycles = [
            cycle(one, cluster, plan.engines[0], where, plan.traffic, colocated=not apart)
            for one in plan.finalists if one.built and plan.engines
        ]  # fmt: skip
    _progress("")
    return plan


def _plan_training(options: argparse.Namespace, model: Model, plan: Plan, reserve: float) -> None:
    """Search and build; fill the plan."""
    value, job, cluster = load_preset(options.k2_preset).value, JOBS[options.job], plan.cluster
    length = options.prompt_length + options.response_length if job.serves else None
    every = candidates(
        options.gpus, model.shape,
        seq_length=options.seq_length or length or int(value("seq_length")),  # type: ignore[call-overload]
        global_batch_size=options.global_batch_size or job.global_batch_size
        or int(value("global_batch_size", 1)),  # type: ignore[call-overload]
        node_gpus=cluster.node_gpus, memory=options.memory, offload=options.optimizer_offload,
        fp8=(options.fp8,), micro_batch_sizes=options.micro_batch_size,
        expert_splits=options.etp, overlap=job.overlap,
    )  # fmt: skip
    for name in SIZES:
        if wanted := getattr(options, name):
            every = [one for one in every if getattr(one, name) in wanted]
    if not every:
        raise ValueError(
            f"no layout divides --gpus {options.gpus}, the model and --global-batch-size; give "
            "other sizes"
        )
    found, plan.layouts = search(model, cluster, every, reserve_bytes=reserve, progress=_progress)
    plan.fitting = len(found)
    plan.finalists = _finish(model, cluster, found, options.top, reserve)


def _finish(
    model: Model, cluster: Cluster, found: Sequence[Estimate], top: int, reserve: float
) -> list[Finalist]:
    """Build the best that differ in more than memory settings; drop what does not fit after all."""
    done: list[Finalist] = []
    seen: set[tuple[int, ...]] = set()
    _progress("tracing the best with their own sizes")
    model.trace(exact_sizes(one.candidate) for one in _different(found, top))
    for guess in found:
        sizes = _sizes(guess)
        if sizes in seen:
            continue
        _progress(f"building {report.name_of(guess)}")
        finalist = finish(model, cluster, guess)
        host = finalist.estimate.host_bytes
        if finalist.refusal or fits(finalist.peak_bytes, host, cluster, reserve):
            seen.add(sizes)
            done.append(finalist)
        if len(done) == top:
            break
    return sorted(done, key=lambda each: (bool(each.refusal), each.estimate.step_s))


def _different(found: Sequence[Estimate], top: int) -> list[Estimate]:
    """Return the first of each kind of layout, ``top`` of them."""
    first: dict[tuple[int, ...], Estimate] = {}
    for guess in found:
        first.setdefault(_sizes(guess), guess)
        if len(first) == top:
            break
    return list(first.values())


def _sizes(guess: Estimate) -> tuple[int, ...]:
    one = guess.candidate
    return one.tp, one.pp, one.ep, one.cp


def _print(title: str, plan: Plan) -> None:
    took = f"({plan.seconds:.0f} s)"
    if plan.finalists:
        _table(
            f"{title}: {plan.fitting} of {plan.layouts} layouts fit {took}",
            report.HEADER, report.rows(plan.finalists, plan.cluster),
        )  # fmt: skip
        for one in plan.finalists:
            print(f"\n# {report.name_of(one.estimate)}")
            print(f"torchrun ... -m megatron_k2.training.pretrain {shlex.join(one.command)}")
    if plan.engines:
        assert plan.traffic is not None
        head = f"{title}: engines, {plan.traffic.weights} weights, upper bounds {took}"
        _table(head, report.ENGINE_HEADER, report.engine_rows(plan.engines, plan.traffic))
        print(
            f"\n{report.engine_flags(plan.engines[0], plan.traffic)}  # vLLM's flags, not run here"
        )
    if plan.cycles:
        rows = [
            [report.name_of(one.estimate), *report.cycle_row(step)]
            for one, step in zip(
                (f for f in plan.finalists if f.built), plan.cycles, strict=True
            )
        ]  # fmt: skip
        head = f"{title}: one step with the first engine, seconds are lower bounds"
        _table(head, ("trainer", *report.CYCLE_HEADER), rows)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console(width=200 if not sys.stdout.isatty() else None).print(table)


def _as_json(plan: Plan) -> dict[str, Any]:
    found = report.as_json(plan.finalists, plan.cluster)
    found["engines"] = [asdict(one) for one in plan.engines]
    found["cycles"] = [
        asdict(one) | {"sync_s": one.sync_s, "step_s": one.step_s} for one in plan.cycles
    ]
    return found


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
