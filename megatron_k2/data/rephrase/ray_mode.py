"""Parts spread over a Ray cluster: `--ray`. The records are those of local mode, byte for byte.

Each worker process rewrites whole parts with its share of the concurrency, and publishes them
itself, so all nodes must see input and output under the same paths. What is left of the budgets is
shared out among the unfinished parts by documents, so the run's are never exceeded. Ray restarts a
part whose worker died; its journal makes that cheap.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_k2.compat import optional
from megatron_k2.data.rephrase.gate import Budget
from megatron_k2.data.rephrase.parts import is_done, read_counts, run_parts, spent_before
from megatron_k2.data.rephrase.run import build_run
from megatron_k2.data.rephrase.sources import Part


class PartWorker:
    """What a Ray worker does with a row that describes a part and its budgets."""

    def __init__(self, args: argparse.Namespace, run: str) -> None:
        self.args, self.run = args, run

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rewrite and publish a part; return its index and what stopped it, if anything did."""
        budget = Budget(row.pop("max_requests"), row.pop("max_tokens"))
        part = Part(**row)
        try:
            error = asyncio.run(self._rewrite(part, budget))
        except (ValueError, OSError, RuntimeError) as found:
            error = found
        return {"index": part.index, "error": "" if error is None else str(error)}

    async def _rewrite(self, part: Part, budget: Budget) -> Exception | None:
        run = build_run(self.args, self.args.ray_workers, budget)
        try:
            return await run_parts(
                [part], run.rewriter, self.args.output, self.run, run.budget,
                2 * max(1, self.args.concurrency // self.args.ray_workers),
            )  # fmt: skip
        finally:
            await run.close()


class Sized(Protocol):
    """A part of a run, and how much there is to do in it."""

    @property
    def index(self) -> int:
        """Its number."""

    @property
    def num_documents(self) -> int:
        """What its share of a budget follows."""


def shares(
    flag: str, total: int | None, spent: dict[int, int], wanted: Sequence[Sized]
) -> dict[int, int | None]:
    """Return what each unfinished part may have spent in the end; together the total.

    Args:
        flag: of the total.
        total: of the run; None without a bound.
        spent: so far, by the index of a part, finished ones too.
        wanted: the unfinished parts.

    Raises:
        ValueError: some part would get nothing.
    """
    if total is None:
        return {part.index: None for part in wanted}
    left = total - sum(spent.values()) - len(wanted)  # each gets one, and then its share
    if left < 0:
        raise ValueError(
            f"{flag} {total}: {sum(spent.values())} are spent, which leaves less than 1 for each "
            f"of {len(wanted)} unfinished parts, as --ray needs; give more"
        )
    found: dict[int, int | None] = {}
    before, documents = 0, sum(part.num_documents for part in wanted)
    for part in wanted:
        upto = before + part.num_documents
        own = left * upto // documents - left * before // documents
        found[part.index] = spent.get(part.index, 0) + 1 + own
        before = upto
    return found


def run_on_ray(
    parts: Sequence[Part],
    args: argparse.Namespace,
    run: str,
    on_part: Callable[[Part, Counter[str]], None],
) -> list[str]:
    """Rewrite parts on Ray; return what failed.

    Args:
        parts: of the run; published ones are left out.
        args: of the command line.
        run: identity of the run.
        on_part: told of each part that was published.

    Raises:
        ValueError: Ray cannot be used here.
    """
    try:
        optional("ray").require()
    except ImportError as error:
        raise ValueError(f"--ray: {error}") from error
    ray = importlib.import_module("ray")
    data = importlib.import_module("ray.data")
    args.output = Path(args.output).resolve()
    wanted = [part for part in parts if not is_done(args.output, part)]
    if not wanted:
        return []
    rows = _rows(parts, wanted, args, run)
    if not ray.is_initialized():
        start_ray(ray, args.ray_address)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    results = data.from_items(rows, override_num_blocks=len(rows)).map(
        PartWorker,
        fn_constructor_args=(args, run),
        concurrency=min(args.ray_workers, len(rows)),
        num_cpus=1,
    )
    by_index = {part.index: part for part in wanted}
    failed: dict[str, None] = {}
    try:
        for result in results.iter_rows():
            part = by_index[result["index"]]
            if result["error"]:
                failed[result["error"]] = None
            else:
                on_part(part, read_counts(args.output, [part]))
    except ray.exceptions.RayError as error:
        failed[f"--ray: {_first_line(error)}; the same command goes on from here"] = None
    return list(failed)


def _rows(
    parts: Sequence[Part], wanted: Sequence[Part], args: argparse.Namespace, run: str
) -> list[dict[str, Any]]:
    spent = spent_before(args.output, parts, run)
    requests = {index: used[0] for index, used in spent.items()}
    tokens = {index: used[1] for index, used in spent.items()}
    max_requests = shares("--max-requests", args.max_requests, requests, wanted)
    max_tokens = shares("--max-tokens", args.max_tokens, tokens, wanted)
    return [
        {
            **asdict(part),
            "path": str(Path(part.path).resolve()),
            "max_requests": max_requests[part.index],
            "max_tokens": max_tokens[part.index],
        }
        for part in wanted
    ]


def start_ray(ray: Any, address: str) -> None:
    """Start Ray here, or join a cluster.

    Args:
        ray: the package.
        address: of the cluster; "" for this machine's.

    Raises:
        ValueError: it does not start.
    """
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises plain ones
        raise ValueError(
            f"--ray: Ray did not start ({_first_line(error)}); see --ray-address"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
