"""The loop of an RL run: roll out, judge, train, sync; the same order on every rank.

Each iteration (arXiv 2507.20534, 3.2.3, 3.3): the weights of this moment are pi_old; every engine
plays its share of the prompts; verdicts become rewards, rewards advantages; episodes and PTX rows
make one global batch; one update or more; then the engine is bound to the new weights and compared
with them. Everything follows from the seed, the step and the checkpoint, so that a run that was
killed goes on as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_k2.gym.base import RIGHT
from megatron_k2.rl.batch_loss import Batch, make_batch
from megatron_k2.rl.colocated import ColocatedEngine
from megatron_k2.rl.critic.in_run import RunCritic
from megatron_k2.rl.curation.probing import ProbingTasks
from megatron_k2.rl.curation.sampler import TaskSampler
from megatron_k2.rl.episode import Group
from megatron_k2.rl.evaluate import Evaluator
from megatron_k2.rl.outcome import (
    GroupOutcome,
    gathered,
    outcome_of,
    rewards_by_id,
    shuffled,
    summary,
    trained_samples,
)
from megatron_k2.rl.progress import progress_line
from megatron_k2.rl.ptx import PtxRows
from megatron_k2.rl.rollout.episode_log import EpisodeLog
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.rows import episode_rows
from megatron_k2.rl.run_folder import RunFolder
from megatron_k2.rl.run_tables import Run
from megatron_k2.rl.update import Update, Updater

KEPT = 2  # checkpoints that a run can go back to with the rollouts that followed them
Play = Callable[[], Coroutine[Any, Any, list[Group]]]


@dataclass
class Parts:
    """What a trainer works with.

    Attributes:
        engine: of this rank's model copy.
        rollouts: on the leader of a copy, else None.
        sampler: of prompts; the same on every rank.
        critic: on a leader, where the run has open prompts or a closed loop; else None.
        probing: on a leader, where the run asks for instructions that fail; else None.
        updater: takes optimizer steps.
        evaluator: asks held-out tasks; None: the run has no evaluation.
        ptx: rows of curated text; None: no PTX loss.
        folder: figures and state.
        episodes: where a leader writes its episodes; None: nowhere.
        save: writes Megatron's checkpoint of a step.
        seq_length: places of a row.
        groups: process groups.
    """

    engine: ColocatedEngine
    rollouts: Rollouts | None
    sampler: TaskSampler
    critic: RunCritic | None
    probing: ProbingTasks | None
    updater: Updater
    evaluator: Evaluator | None
    ptx: PtxRows | None
    folder: RunFolder
    episodes: EpisodeLog | None
    save: Any
    seq_length: int
    groups: Any


class Trainer:
    """A run.

    Args:
        run: of the run file.
        parts: what it works with.
        first: step to begin with; above 0 the state of that checkpoint is loaded.
    """

    def __init__(self, run: Run, parts: Parts, first: int = 0) -> None:
        self._run, self._parts, self._first = run, parts, first
        self._saved: list[Any] = []
        self._noted: dict[str, float] = {}  # of the critic, in the step under way
        if first:
            parts.sampler.load_state_dict(parts.folder.load_state(first, self._sampler_state))
            copy = parts.engine.copy
            if parts.rollouts is not None:
                parts.rollouts.load_state_dict(parts.folder.load_state(first, f"rollouts_{copy}"))
            for name, part in self._stateful:
                part.load_state_dict(parts.folder.load_state(first, f"{name}_{copy}"))
        parts.folder.begin(first)
        if parts.episodes is not None:
            parts.episodes.rewind(first)

    @property
    def _stateful(self) -> list[tuple[str, Any]]:
        """What adds tasks of its own, by name."""
        found = [("critic", self._parts.critic), ("probing", self._parts.probing)]
        return [(name, part) for name, part in found if part is not None]

    @property
    def _sampler_state(self) -> str:
        return f"sampler_{self._parts.engine.copy}" if self._run.rollout.max_lag else "sampler"

    def train(self, save_every: int = 0) -> None:
        """Run all steps that are left.

        Args:
            save_every: steps between checkpoints, besides the last; 0: only the last.

        Raises:
            RuntimeError: trainer and engine are further apart than the run file allows.

        Collective: all ranks must call.
        """
        self._parts.engine.sync(self._first)
        for step in range(self._first, self._run.steps):
            self._evaluate(step)
            self._iterate(step)
            if (save_every and (step + 1) % save_every == 0) or step + 1 == self._run.steps:
                self._save(step + 1)
        self._evaluate(self._run.steps, last=True)

    def _iterate(self, step: int) -> None:
        began = time.monotonic()
        outcomes = self._roll_out(step)
        rolled_out = time.monotonic()
        if self._run.shuffle_rewards:
            outcomes = shuffled(outcomes, self._run.seed, step)
        batch = self._batch(outcomes, step)
        updates = self._updates(batch, step)
        trained = time.monotonic()
        self._parts.engine.sync(step + 1)
        times = {
            "rollout_s": rolled_out - began,
            "train_s": trained - rolled_out,
            "sync_s": time.monotonic() - trained,
        }
        self._report(step, outcomes, batch, updates, times)

    def _roll_out(self, step: int) -> list[GroupOutcome]:
        rules, parts = self._run.rollout, self._parts
        copy, copies = parts.engine.copy, parts.engine.num_copies
        temperature = rules.temperature.at(step)
        play = self._play_ahead if rules.max_lag else self._play_together
        played = parts.engine.run(self._judged(play(step, temperature), step))
        groups, noted = played or ([], {})
        own_outcomes = [
            outcome_of(group, copy + copies * place, step, self._run.rewards, step)
            for place, group in enumerate(groups)
        ]
        self._noted = noted
        if parts.episodes is not None and groups:
            parts.episodes.write(step, groups, rewards_by_id(groups, own_outcomes))
        outcomes = gathered(own_outcomes)
        for one in own_outcomes if rules.max_lag else outcomes:
            right = sum(score >= RIGHT for score in one.scores)
            parts.sampler.report(one.task, right, len(one.scores), one.env)
        return outcomes

    def _judged(
        self, play: Play, step: int
    ) -> Callable[[], Coroutine[Any, Any, tuple[list[Group], dict[str, float]]]]:
        """Play, and have the critic judge what was played."""
        critic, probing = self._parts.critic, self._parts.probing

        async def work() -> tuple[list[Group], dict[str, float]]:
            groups = await play()
            if probing is not None:
                probing.add(groups)
            return groups, {} if critic is None else await critic.judge(groups, step)

        return work

    def _play_together(self, step: int, temperature: float) -> Play:
        """All tokens of the batch come from this step's weights; engines share one sampler."""
        parts = self._parts
        drawn = parts.sampler.draw(self._run.rollout.groups, step)
        copies = parts.engine.num_copies
        own = [task for task, _ in drawn[parts.engine.copy :: copies]]
        if parts.critic is not None:
            own += parts.critic.tasks(step, copies)
        if parts.probing is not None:
            own += parts.probing.tasks(step)

        async def play() -> list[Group]:
            assert parts.rollouts is not None
            return await parts.rollouts.collect(own, version=step, temperature=temperature)

        return play

    def _play_ahead(self, step: int, temperature: float) -> Play:
        """Partial rollout: what is not complete goes on with the next weights; each engine has a
        sampler of its own, because each draws as its slots come free."""
        parts, rules = self._parts, self._run.rollout

        async def play() -> list[Group]:
            assert parts.rollouts is not None
            return await parts.rollouts.collect_partial(
                lambda: parts.sampler.draw(1, step)[0][0],
                rules.groups // parts.engine.num_copies,
                version=step,
                temperature=temperature,
                segment_tokens=rules.segment_tokens,
            )

        return play

    def _batch(self, outcomes: Sequence[GroupOutcome], step: int) -> Batch:
        parts = self._parts
        samples = trained_samples(outcomes, self._run.objective.train_even_groups)
        if not samples:
            raise RuntimeError(f"step {step}: no episode could be judged; see rl/rollouts_*")
        rows = episode_rows(samples, parts.seq_length)
        ptx = [] if parts.ptx is None else parts.ptx.step(step)
        size = parts.groups.dp.size()
        return make_batch(samples, rows, ptx, parts.seq_length, size, self._run.ptx.weight)

    def _updates(self, batch: Batch, step: int) -> list[Update]:
        rules = self._run.objective
        if rules.reset_optimizer:
            self._parts.updater.reset_optimizer()
        found = []
        for number in range(rules.updates):
            found.append(self._parts.updater(batch, number, step))
            if number == 0 and found[0].gap_nats > rules.max_gap_nats:
                raise RuntimeError(
                    f"step {step}: trainer and engine are {found[0].gap_nats:.3g} nats a token "
                    f"apart, more than max_gap_nats {rules.max_gap_nats:g} of the run file"
                )
        return found

    def _save(self, step: int) -> None:
        parts = self._parts
        keeps = torch.distributed.get_rank() == 0
        if self._run.rollout.max_lag:  # every engine draws for itself, on its leader
            keeps = parts.engine.is_leader
        if keeps:
            parts.folder.save_state(step, self._sampler_state, parts.sampler.state_dict())
        if parts.rollouts is not None:
            name = f"rollouts_{parts.engine.copy}"
            state = parts.rollouts.state_dict()
            parts.folder.save_state(step, name, state)
            self._saved.append(state)
        for name, part in self._stateful:
            parts.folder.save_state(step, f"{name}_{parts.engine.copy}", part.state_dict())
        torch.distributed.barrier()
        parts.save(step)
        if parts.rollouts is not None and len(self._saved) > KEPT:
            parts.rollouts.saved(self._saved.pop(0))

    def _evaluate(self, step: int, last: bool = False) -> None:
        evaluator, every = self._parts.evaluator, self._run.evaluation.every
        if evaluator is None or not every or not (last or step % every == 0):
            return
        found = evaluator(self._parts.engine, step)
        self._parts.folder.write({"step": step, "kind": "evaluation"} | found)
        _say(f"step {step:5d} | held out | {found['text']}")

    def _report(
        self,
        step: int,
        outcomes: Sequence[GroupOutcome],
        batch: Batch,
        updates: Sequence[Update],
        times: dict[str, float],
    ) -> None:
        rolled, last = summary(outcomes), updates[-1]
        figures = {"step": step, "kind": "train", "temperature": self._temperature(step)}
        figures |= asdict(rolled) | asdict(last) | times
        if self._noted:
            figures["critic"] = self._noted
        if self._parts.probing is not None:
            figures["probing"] = self._parts.probing.scalars()
        if self._parts.rollouts is not None:
            figures["rollouts"] = self._parts.rollouts.metrics.figures()
        figures |= {"gap_nats": updates[0].gap_nats, "rows": len(batch.rows)}
        self._parts.folder.write(figures)
        left_s = sum(times.values()) * (self._run.steps - step - 1)
        _say(progress_line(step, rolled, updates, times, left_s))

    def _temperature(self, step: int) -> float:
        return self._run.rollout.temperature.at(step)


def _say(line: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(line, flush=True)
