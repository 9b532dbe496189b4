"""Parts spread over a Ray cluster: `--ray`. The records are those of local mode, byte for byte.

Each worker process rewrites whole parts with its share of the concurrency, and publishes them
itself, so all nodes must see input and output under the same paths. A part's budget is its share of
the run's by documents, so the run's is never exceeded. Ray restarts a part whose worker died; its
journal makes that cheap.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_k2.compat import optional
from megatron_k2.data.rephrase.parts import is_done, read_counts, run_parts
from megatron_k2.data.rephrase.run import build_run
from megatron_k2.data.rephrase.sources import Part


class PartWorker:
    """What a Ray worker does with a row that describes a part."""

    def __init__(self, args: argparse.Namespace, run: str, num_documents: int) -> None:
        self.args, self.run, self.num_documents = args, run, num_documents

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rewrite and publish a part; return its index and what stopped it, if anything did."""
        return asyncio.run(self._rewrite(Part(**row)))

    async def _rewrite(self, part: Part) -> dict[str, Any]:
        share = part.num_documents / self.num_documents
        run = build_run(self.args, self.args.ray_workers, share)
        try:
            error = await run_parts(
                [part], run.rewriter, self.args.output, self.run, run.budget,
                2 * max(1, self.args.concurrency // self.args.ray_workers),
            )  # fmt: skip
        finally:
            await run.close()
        return {"index": part.index, "error": "" if error is None else str(error)}


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
    if not ray.is_initialized():
        ray.init(address=args.ray_address or None, log_to_driver=False, logging_level="ERROR")
    args.output = Path(args.output).resolve()
    wanted = [part for part in parts if not is_done(args.output, part)]
    if not wanted:
        return []
    rows = [{**asdict(part), "path": str(Path(part.path).resolve())} for part in wanted]
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    results = data.from_items(rows, override_num_blocks=len(rows)).map(
        PartWorker,
        fn_constructor_args=(args, run, sum(part.num_documents for part in parts)),
        concurrency=min(args.ray_workers, len(rows)),
        num_cpus=1,
    )
    by_index = {part.index: part for part in wanted}
    failed: dict[str, None] = {}
    for result in results.iter_rows():
        part = by_index[result["index"]]
        if result["error"]:
            failed[result["error"]] = None
        else:
            on_part(part, read_counts(args.output, [part]))
    return list(failed)
