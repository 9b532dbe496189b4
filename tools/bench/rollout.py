"""Partial rollout against the synchronous batch, on the local engine, with long-tailed lengths.

``.venv/bin/python tools/bench/rollout.py`` plays the same groups (``--batches`` batches of
``--groups`` tasks, K answers each) with the same engine over a K2-shaped model; each answer ends at
its own log-normal length (rollout_engines.py). ``sync``: whole batches, the trainer waits.
``partial``: each iteration ends with enough complete groups, the rest is paused; the last
iterations drain what is left, which counts against it, so that all contestants deliver exactly the
same answers; what goes on is read again, by the new weights. ``partial_kept``: it goes on over the
latents that the old ones left in the cache (``old_latents``). ``continuous``: one version behind,
while the trainer works in a thread. The trainer is a forward and backward pass of the model over a
share of the delivered rows; new weights are a new version of the same numbers. Contestants take
turns, ``--repeats`` times. ``--stepped-ms`` adds rows of a simulated engine whose steps take so
long whatever their batch, and a trainer that takes as long as the other; they count for nothing but
themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402
from rollout_engines import SteppedEngine, Stopping  # noqa: E402

from megatron_k2.chat.kimi import KimiFormat  # noqa: E402
from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged  # noqa: E402
from megatron_k2.gym.services import Services  # noqa: E402
from megatron_k2.rl.episode import Group  # noqa: E402
from megatron_k2.rl.rollout.continuous import Production  # noqa: E402
from megatron_k2.rl.rollout.fresh import seed_of  # noqa: E402
from megatron_k2.rl.rollout.scheduler import Rollouts  # noqa: E402
from megatron_k2.rl.rollout.settings import RolloutSettings  # noqa: E402

BAR = 1.5  # of the issue: samples a second of partial over synchronous
VOCABULARY = 512  # of the preset k2-micro: all bytes and the control tokens
CONTESTANTS = ("sync", "partial", "partial_kept", "continuous")
PARTIAL = CONTESTANTS[1:3]


class Lengths(SingleTurn):
    """Judges nothing."""

    name = "lengths"

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> Sequence[Task]:
        """Not used: see ``tasks_of``."""
        return []

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """There are no right answers."""
        return ()

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Call every answer wrong."""
        return judged(0.0)


@dataclass
class Result:
    """What a contestant took.

    Attributes:
        wall_s: for all batches, training included.
        rollout_s, rollout_cpu_s: that the trainer waited; CPU of the process meanwhile, which
            other work on the machine disturbs less.
        samples, tokens: delivered.
        busy_s, slot_s: of the engine's slots.
        lag: of the oldest trained token, in versions.
    """

    wall_s: float
    rollout_s: float
    rollout_cpu_s: float
    samples: int
    tokens: int
    busy_s: float
    slot_s: float
    lag: int


def build_format() -> KimiFormat:
    """Return a format over single bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiktoken.model"
        lines = (b"%s %d\n" % (b64encode(bytes([byte])), byte) for byte in range(256))
        path.write_bytes(b"".join(lines))
        return KimiFormat.load(path)


def build_model(preset: str) -> Any:
    """Return a Megatron model of a preset's shape, in fp32."""
    from contestants import parsed_args, start_single_process

    args = parsed_args(preset, 1, 512)
    start_single_process()
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_k2.model.specs import get_k2_layer_specs

    args.params_dtype, args.bf16 = torch.float32, False
    config = core_transformer_config_from_args(args)
    torch.manual_seed(0)
    return GPTModel(
        config,
        get_k2_layer_specs(config),
        vocab_size=VOCABULARY,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=False,
    ).eval()


def tasks_of(options: Any) -> Iterator[Task]:
    """Return the tasks of all batches."""
    message = {"role": "user", "content": "go"}
    for at in range(options.batches * options.groups):
        yield Task(f"t{at}", "lengths", (message,), budget=options.longest)


def length_of(options: Any, episode: str) -> int:
    """Return an answer's length: log-normal, the same for every contestant."""
    source = random.Random(seed_of(options.seed, episode))
    drawn = options.median * source.lognormvariate(0.0, options.sigma)
    return min(max(4, round(drawn)), options.longest)


def train(model: Any, groups: Sequence[Group], share: float) -> None:
    """Go forward and backward over a share of the delivered rows."""
    rows = [one.ledger.row() for group in groups for one in group.episodes]
    for row in rows[: round(share * len(rows))]:
        ids = torch.tensor([row.ids])
        places = torch.arange(ids.shape[1])[None]
        logits = model(ids, places, None)[0, :-1].float()
        mask = torch.tensor(row.loss_mask[1:], dtype=torch.float32)
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        (losses * mask).sum().backward()
    model.zero_grad()


class LocalSide:
    """The local engine over a model, and a trainer of its copy."""

    def __init__(self, options: Any, format: KimiFormat) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron prints its arguments
            self.model = build_model(options.preset)
        torch.set_num_threads(THREADS)
        self.options, self.format = options, format
        self.train_s: list[float] = []

    def engine(self) -> Any:
        """Return a fresh engine."""
        from megatron_k2.engine.core import LocalCore
        from megatron_k2.engine.local import LocalEngine
        from megatron_k2.engine.scheduler import Limits
        from megatron_k2.rl.colocated import TURN

        slots, context = self.options.slots, self.options.longest + 64
        limits = Limits(
            context, slots * (context + 16), max_running=slots, step_tokens=max(512, 2 * slots),
            keeps_pages=True,
        )  # fmt: skip
        core = LocalCore(self.model, limits, vocab_size=VOCABULARY)
        return LocalEngine(core, THREADS, TURN)

    async def update(self, engine: Any, version: int) -> None:
        """Give the engine a new version."""
        await engine.update_weights(version, lambda: None)

    def train(self, groups: Sequence[Group]) -> None:
        """Train."""
        began = time.perf_counter()
        train(self.model, groups, self.options.train_share)
        self.train_s.append(time.perf_counter() - began)


class SteppedSide:
    """The simulated engine, and a trainer that sleeps."""

    def __init__(self, options: Any, format: KimiFormat, train_s: float) -> None:
        self.options, self.format, self._train_s = options, format, train_s

    def engine(self) -> Any:
        """Return a fresh engine."""
        return SteppedEngine(self.options.stepped_ms / 1000, self.options.longest + 64)

    async def update(self, engine: Any, version: int) -> None:
        """Give the engine a new version."""
        engine.weight_version = version

    def train(self, groups: Sequence[Group]) -> None:
        """Take as long as the real one."""
        time.sleep(self._train_s)


async def play(name: str, side: Any, options: Any) -> Result:
    """Play all batches as one contestant."""
    lag = 0 if name == "sync" else options.max_lag
    settings = RolloutSettings(
        seed=options.seed, group_size=options.samples, slots=options.slots, max_lag=lag,
        repetition=None, max_episodes=4 * options.slots, old_latents=name == PARTIAL[1],
    )  # fmt: skip
    engine = side.engine()
    stopping = Stopping(engine, lambda episode: length_of(options, episode))
    rollouts = Rollouts(stopping, side.format, Services(), settings, environments=lambda _: Lengths)
    tasks = tasks_of(options)
    production = Production(rollouts, lambda: next(tasks, None), options.groups) if lag else None
    found = Result(0.0, 0.0, 0.0, 0, 0, 0.0, 0.0, 0)
    began = time.perf_counter()
    for step in range(options.batches):
        await side.update(engine, step)
        asked, cpu = time.perf_counter(), time.process_time()
        if name == "sync":
            batch = [next(tasks) for _ in range(options.groups)]
            groups = await rollouts.collect(batch, step, 1.0)
        elif name in PARTIAL:
            groups = await rollouts.collect_partial(
                lambda: next(tasks, None), options.groups, step, 1.0, options.segment
            )
        else:
            assert production is not None
            groups = await production.take(step, 1.0)
        found.rollout_s += time.perf_counter() - asked
        found.rollout_cpu_s += time.process_time() - cpu
        metrics = rollouts.metrics
        found.samples += metrics.episodes
        found.tokens += sum(one.num_sampled for group in groups for one in group.episodes)
        found.busy_s += metrics.busy_s
        found.slot_s += metrics.slot_s
        found.lag = max(found.lag, metrics.lag)
        if name == "continuous":
            await asyncio.to_thread(side.train, groups)
        else:
            side.train(groups)
    found.wall_s = time.perf_counter() - began
    if production is not None:
        await production.stop()
    await rollouts.close()
    await engine.close()
    return found


def main() -> None:
    """Run all contestants in turns; print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="k2-micro")
    parser.add_argument("--groups", type=int, default=8, help="a batch")
    parser.add_argument("--samples", type=int, default=4, help="answers a group")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--slots", type=int, default=32, help="sequences that the engine decodes")
    parser.add_argument("--median", type=float, default=40.0, help="tokens of an answer")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of lengths")
    parser.add_argument("--longest", type=int, default=600, help="tokens of an answer")
    parser.add_argument("--segment", type=int, default=0, help="tokens an iteration; 0: no bound")
    parser.add_argument("--max-lag", type=int, default=8, help="of partial and continuous")
    parser.add_argument("--train-share", type=float, default=0.25, help="of the rows are trained")
    parser.add_argument("--stepped-ms", type=float, default=0.0, help="a simulated engine's step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    side = LocalSide(options, build_format())
    figures = report(options, "", in_turns(side, options))
    for name in PARTIAL:
        ratio = figures[f"{name}_vs_sync"]
        held = "ok" if ratio >= BAR else "FAILS"
        print(f"  {name} against sync {ratio:.2f}, bar >= {BAR:g}: {held}")
    if options.stepped_ms:
        stepped = SteppedSide(options, side.format, statistics.median(side.train_s))
        figures |= report(options, "simulated_", in_turns(stepped, options))
    print_json(threads=THREADS, load_average=os.getloadavg()[0], **figures)


def in_turns(side: Any, options: Any) -> dict[str, list[Result]]:
    """Run the contestants one after the other, again and again."""
    results: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    for repeat in range(options.repeats):
        for name in CONTESTANTS:
            results[name].append(asyncio.run(play(name, side, options)))
            print(f"{name} {repeat}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def report(options: Any, prefix: str, results: dict[str, list[Result]]) -> dict[str, Any]:
    """Print samples a second, the trainer's idle share and ratios; return them by name."""

    def median(name: str, what: Any) -> float:
        return statistics.median(what(one) for one in results[name])

    rows: list[tuple[object, ...]] = []
    figures: dict[str, Any] = {}
    for name, found in results.items():
        waited = median(name, lambda one: one.samples / one.rollout_s)
        whole = median(name, lambda one: one.samples / one.wall_s)
        by_cpu = median(name, lambda one: one.samples / one.rollout_cpu_s)
        idle = median(name, lambda one: one.rollout_s / one.wall_s)
        used = median(name, lambda one: one.busy_s / one.slot_s)
        figures |= {
            f"{prefix}{name}_samples_per_s": waited,
            f"{prefix}{name}_samples_per_cpu_s": by_cpu,
            f"{prefix}{name}_run_samples_per_s": whole,
            f"{prefix}{name}_trainer_idle": idle,
            f"{prefix}{name}_utilisation": used,
        }
        first = {
            key: figures[f"{prefix}sync_{key}"]
            for key in ("samples_per_s", "samples_per_cpu_s", "run_samples_per_s")
        }
        alone = name == "continuous"  # its rollouts go on while it trains
        rows.append(
            (
                name,
                "-" if alone else f"{waited:.1f}",
                "-" if alone else f"{waited / first['samples_per_s']:.2f}",
                "-" if alone else f"{by_cpu / first['samples_per_cpu_s']:.2f}",
                f"{whole:.1f}",
                f"{whole / first['run_samples_per_s']:.2f}",
                f"{100 * idle:.0f} %",
                f"{100 * used:.0f} %",
                max(one.lag for one in found),
            )
        )
    for key in ("", "cpu_"):
        base = figures[f"{prefix}sync_samples_per_{key}s"]
        for name in PARTIAL:
            figures[f"{prefix}{name}_vs_sync{'_by_cpu' if key else ''}"] = (
                figures[f"{prefix}{name}_samples_per_{key}s"] / base
            )
    figures[f"{prefix}trainer_idle"] = figures[f"{prefix}sync_trainer_idle"]
    lengths = {(one.samples, one.tokens) for found in results.values() for one in found}
    samples, tokens = max(lengths)
    engine = f"simulated engine, {options.stepped_ms:g} ms a step" if prefix else options.preset
    title = (
        f"{engine}: {options.batches} batches of {options.groups} x {options.samples} answers, "
        f"log-normal (median {options.median:g}, sigma {options.sigma:g}, at most "
        f"{options.longest}; mean {tokens / samples:.0f}), {options.slots} slots, "
        f"{100 * options.train_share:g} % of rows trained, {THREADS} thread, "
        f"median of {options.repeats}"
    )
    header = (
        "rollout", "samples/s", "ratio", "by CPU", "with training", "ratio", "trainer idle",
        "slots busy", "oldest token",
    )  # fmt: skip
    print_table(title, header, rows)
    if len(lengths) > 1:
        print(f"  NOT the same answers were delivered: {sorted(lengths)}")
    return figures


if __name__ == "__main__":
    main()
