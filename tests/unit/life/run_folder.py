"""A run folder of a life, its logs written by the parts that write them in a real run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_k2.agentic.records import Agent, Judgement, Record
from megatron_k2.life.report_trajectories import FILES
from megatron_k2.rl.outcome import GroupOutcome, summary
from megatron_k2.rl.rollout.episode_log import EpisodeLog
from megatron_k2.rl.run_folder import RunFolder
from tests.unit.agentic.judge.dialogues import criterion, good, task
from tests.unit.rl.rollout.scripted import SeededEngine, rollouts_of, run, task_of

ATTACK = "</pre><script>document.title='owned'</script><img src=https://example.com/x>"
STAGES = ("corpus", "pretrain", "synthesize", "rl", "serve")
ABOUT = {
    "name": "k2-small",
    "title": "A small life",
    "seed": 7,
    "settings": {"steps": 30},
    "versions": {"torch": "2.14.1"},
    "code": "commit 0123",
    "machine": {"processor": "two cores"},
    "stages": [{"name": name, "title": f"What {name} does"} for name in STAGES],
}


def write_life(out: Path, **done: Mapping[str, Any]) -> Path:
    """Write a run; stages that are not told of are not run."""
    (out / "stages").mkdir(parents=True)
    (out / "life.json").write_text(json.dumps(ABOUT))
    for at, name in enumerate(STAGES, start=1):
        if (record := done.get(name)) is not None:
            folder = out / "stages" / f"{at:02}-{name}"
            folder.mkdir()
            whole = {
                "name": name, "title": f"What {name} does", "started": "2026-11-29T01:00:00Z",
                "seconds": 75.5, "commands": [f"python -m megatron_k2.{name} --seed 7"],
                "figures": {}, "samples": [],
                "files": {f"stages/{name}.bin": "ab" * 32}, "artifacts": {},
            }  # fmt: skip
            (folder / "done.json").write_text(json.dumps({**whole, **record}))
    return out


def whole_life(out: Path) -> Path:
    """Write a run of which the last stage is missing."""
    write_trainings(out / "logs")
    write_synthesis(out / "agentic")
    write_rl(out / "trained")
    loss = {"before": 6.9, "after": 3.1, "better": "lower", "unit": "nats/token"}
    right = {"before": 0.5, "after": 0.4, "better": "higher", "unit": ""}
    text = {"before": None, "after": 4.5, "better": "higher", "unit": "MB"}
    return write_life(
        out,
        corpus={"figures": {"text": text}, "samples": [{"title": ATTACK, "after": ATTACK}]},
        pretrain={
            "figures": {"held-out loss": loss},
            "artifacts": {"tensorboard": "logs"},
            "samples": [{"title": f"sample {at}", "before": "b", "after": "a"} for at in range(4)],
        },
        synthesize={"artifacts": {"episodes": "agentic"}},
        rl={"figures": {"accuracy": right}, "artifacts": {"episodes": "trained"}},
    )


def write_trainings(folder: Path) -> None:
    """Log two stages of a recipe into one folder, with the writer and in the form of Megatron."""
    from torch.utils.tensorboard import SummaryWriter

    for stage, (name, length) in enumerate({"pretraining": 256, "long-context": 2048}.items()):
        with SummaryWriter(str(folder), filename_suffix=f".{stage}") as writer:
            given = "('seq_length', 'lr')"
            told = {"save": f"/out/stages/0{stage}-{name}", "seq_length": length, "lr": 0.01}
            for key, value in {**told, "qk_clip_threshold": 100.0, "k2_explicit": given}.items():
                writer.add_text(key, str(value), global_step=0)
            for step in range(1 + 20 * stage, 21 + 20 * stage):
                moment = 1000.0 + 2 * step
                figures = {
                    "lm loss": 7 - step / 10, "lm loss vs samples": 1.0, "learning-rate": 0.01,
                    "batch-size": 4, "grad-norm": 1.0, "expert balance": 1.5, "cold experts": 0,
                    "max_attention_logit": step, "k2/max-logit/layer-01": step,
                    "k2/max-logit/layer-02": 2.0, "k2/heads-clipped": 0.25,
                    "k2/update-rms/mlp": 0.2, "k2/orthogonality-residual/mlp": 0.3,
                }  # fmt: skip
                for tag, value in figures.items():
                    writer.add_scalar(tag, value, step, walltime=moment)
            writer.add_scalar("lm loss validation-heldout", 4.5 - stage, step, walltime=moment)


def write_synthesis(folder: Path) -> None:
    """Write a run of tools/synthesize_agentic.py with one trajectory that is kept, one dropped."""
    agent = Agent("website_control/shop", "You help.", ())
    of = replace(task(criterion({"kind": "ended"})), agent=agent.id)
    made = [script.done(of) for script in (good().user(ATTACK).say("Done."), good().say("No."))]
    records: dict[str, list[Record]] = {
        "agents": [agent],
        "tasks": [of],
        "trajectories": [*made],
        "judgements": [
            Judgement(made[0].id, True, {"it": 1}, {"it": "rule"}, {}),
            Judgement(made[1].id, False, {"it": 0}, {"it": "judge"}, {}, ("wrong_tool",)),
        ],
    }
    for kind, name in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one.to_json()) + "\n" for one in records[kind]))


def write_rl(folder: Path) -> None:
    """Play episodes with a scripted engine, and log them as the trainer does."""
    metrics, log = RunFolder(folder, writes=True), EpisodeLog(folder / "rl" / "rollouts_0")
    engine = SeededEngine()
    rollouts = rollouts_of(engine)

    async def body() -> None:
        for step in range(3):
            engine.weight_version = step
            groups = await rollouts.collect([task_of(step, "talk"), task_of(step)], step, 1.0)
            rewards = {one.id: one.score or 0.0 for group in groups for one in group.judged}
            log.write(step, groups, rewards)
            figures = {"step": step, "kind": "train", "max_logit": 3.5, "rollout_s": 1.0}
            figures |= asdict(
                summary([_outcome(at, one, rewards) for at, one in enumerate(groups)])
            )
            metrics.write({**figures, "rollouts": rollouts.metrics.figures()})
        await rollouts.close()

    run(body)
    right = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "num_tasks": 100, "num_unjudged": 0}
    metrics.write({"step": 3, "kind": "evaluation", "by_env": {"talk": right}})
    with (folder / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "kin')  # a kill cut it short


def _outcome(place: int, group: Any, rewards: Mapping[str, float]) -> GroupOutcome:
    judged = [one for one in group.judged if one.score is not None]
    return GroupOutcome(
        place, group.id, group.task.id, group.task.env, (),
        tuple(rewards[one.id] for one in judged), tuple(float(one.score or 0) for one in judged),
        tuple(str(one.ending) for one in group.episodes), 0,
        tuple(one.num_sampled for one in judged),
    )  # fmt: skip
