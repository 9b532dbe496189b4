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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_k2.planning import report
from megatron_k2.planning.cluster import Cluster, load_cluster
from megatron_k2.planning.dry_run import silence
from megatron_k2.planning.estimate import GRADIENT, PARAMETER, Estimate
from megatron_k2.planning.flags import BATCH_PER_GPU, SIZES, check, parser
from megatron_k2.planning.jobs import JOBS
from megatron_k2.planning.model import Model
from megatron_k2.planning.picture import draw
from megatron_k2.planning.reinforcement import Cycle, cycle
from megatron_k2.planning.search import (
    Finalist,
    Found,
    exact_sizes,
    finish,
    fits,
    search,
)
from megatron_k2.planning.serving import Engine, Traffic, engines
from megatron_k2.planning.settings import candidates
from megatron_k2.planning.workers import Mapper, workers


@dataclass
class Plan:
    """What was asked and what was found.

    Attributes:
        cluster: the trainer's, or the engine's where nothing is trained.
        found: what the search found.
        num_weights: of the model, all and trained.
        finalists: the best, built.
        engines: instances, best first.
        traffic: what they are asked.
        cycles: of reinforcement learning, best first.
        seconds: that the plan took.
    """

    cluster: Cluster
    found: Found | None = None
    num_weights: tuple[int, int] = (0, 0)
    finalists: list[Finalist] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    traffic: Traffic | None = None
    cycles: list[Cycle] = field(default_factory=list)
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; return 0, 1 if nothing fits, 2 for a wrong argument."""
    options = parser(__doc__ or "").parse_args(argv)
    job = JOBS[options.job]
    start = time.monotonic()
    try:
        check(options)
        with silence(), workers(options.workers) as mapper:
            plan = _plan(options, mapper)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    plan.seconds = time.monotonic() - start
    gpus = f"{plan.cluster.num_gpus} {plan.cluster.name}"
    if job.trains and not plan.finalists:
        print(_none_fits(plan, options.reserve_gb), file=sys.stderr)
        return 1
    if job.serves and not plan.engines:
        cause = "is fast enough (--slowest)" if options.slowest else "fits with one request"
        print(
            f"plan: no engine of {options.k2_preset} with {options.engine_weights} weights "
            f"{cause} on {gpus} (--gpus, --engine-weights, --slowest)",
            file=sys.stderr,
        )
        return 1
    _print(f"{options.k2_preset}, {options.job}, {gpus}", options.job, plan)
    if options.json:
        options.json.write_text(json.dumps(_as_json(plan), indent=1) + "\n", encoding="utf-8")
    if options.picture and plan.finalists:
        draw(plan.finalists[0], plan.cluster, options.picture)
    return 0


def _none_fits(plan: Plan, reserve_gb: float) -> str:
    """Return what is missing, by the layout that misses least."""
    assert plan.found is not None
    cluster, nearest = plan.cluster, plan.found.nearest
    text = f"plan: none of {plan.found.number} layouts fits {cluster.num_gpus} {cluster.name}"
    if nearest is None:
        return f"{text}: what was estimated to fit did not when it was built"
    worst = max(nearest.memory, key=lambda one: one.total)
    cells = ", ".join(
        f"{name} {value}"
        for name, value in zip(report.KINDS, report.memory_cells(worst), strict=True)
    )
    room = cluster.memory_bytes / report.GB - reserve_gb
    host = cluster.host_bytes / cluster.node_gpus / report.GB
    return (
        f"{text}.\nThe nearest, {report.name_of(nearest)}, needs "
        f"{report.gigabytes(nearest.peak_bytes)} GB of {room:.1f} on a GPU and "
        f"{report.gigabytes(nearest.host_bytes)} GB of {host:.1f} on its host ({cells}).\n"
        "Less: --memory host or full, --optimizer-offload all, larger --pp, --tp, --ep or --gpus"
    )


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
    job, cluster = JOBS[options.job], plan.cluster
    batch = options.global_batch_size or job.global_batch_size or model.value("global_batch_size")
    length = options.prompt_length + options.response_length if job.serves else None
    every = candidates(
        options.gpus, model.shape,
        seq_length=options.seq_length or length or int(model.value("seq_length", 4096)),
        global_batch_size=int(batch or BATCH_PER_GPU * options.gpus),
        node_gpus=cluster.node_gpus, memory=options.memory, offload=options.optimizer_offload,
        fp8=(options.fp8,), micro_batch_sizes=options.micro_batch_size,
        expert_splits=options.etp, overlap=job.overlap,
    )  # fmt: skip
    for name in SIZES:
        if wanted := getattr(options, name):
            every = [one for one in every if getattr(one, name) in wanted]
    if not every:
        raise ValueError(
            f"no layout divides --gpus {options.gpus}, the model and --global-batch-size "
            f"{batch or BATCH_PER_GPU * options.gpus}; give other sizes"
        )
    plan.found = search(model, cluster, every, reserve_bytes=reserve, progress=_progress)
    plan.num_weights = model.num_weights()
    key = _all_sizes if options.similar else _sizes
    plan.finalists = _finish(model, cluster, plan.found.fitting, options.top, reserve, key)


def _finish(
    model: Model,
    cluster: Cluster,
    found: Sequence[Estimate],
    top: int,
    reserve: float,
    key: Callable[[Estimate], Any],
) -> list[Finalist]:
    """Build the best of each ``key``; drop what does not fit after all."""
    done: list[Finalist] = []
    seen: set[Any] = set()
    _progress("tracing the best with their own sizes")
    model.trace(exact_sizes(one.candidate) for one in _different(found, top, key))
    for guess in found:
        sizes = key(guess)
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


def _different(
    found: Sequence[Estimate], top: int, key: Callable[[Estimate], Any]
) -> list[Estimate]:
    """Return the first of each ``key``, ``top`` of them."""
    first: dict[Any, Estimate] = {}
    for guess in found:
        first.setdefault(key(guess), guess)
        if len(first) == top:
            break
    return list(first.values())


def _sizes(guess: Estimate) -> tuple[int, ...]:
    one = guess.candidate
    return one.tp, one.pp, one.ep, one.cp


def _all_sizes(guess: Estimate) -> Any:
    return guess.candidate


def _print(title: str, job: str, plan: Plan) -> None:
    took = f"({plan.seconds:.0f} s)"
    if plan.finalists:
        assert plan.found is not None
        fitting, number = len(plan.found.fitting), plan.found.number
        every, trained = plan.num_weights
        state = report.gigabytes(PARAMETER * every + GRADIENT * trained)
        _table(
            f"{title}: {fitting} of {number} layouts fit {took}\n"
            f"{every:,} weights, {trained:,} trained, {state} GB with gradients",
            report.HEADER, report.rows(plan.finalists, plan.cluster),
        )  # fmt: skip
        _table("a step", report.SENT_HEADER, report.sent_rows(plan.finalists))
        gpus = plan.cluster.num_gpus
        least = -(-gpus // plan.cluster.node_gpus)
        nodes = next(number for number in range(least, gpus + 1) if gpus % number == 0)
        for one in plan.finalists:
            print(f"\n# {report.name_of(one.estimate)}")
            start = f"torchrun --nnodes {nodes} --nproc-per-node {gpus // nodes}"
            print(f"{start} -m {JOBS[job].runner} {shlex.join(one.command)}")
        print(f"\n# to add: {JOBS[job].missing}")
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
