"""From a recipe to Megatron command lines: counts, schedules, folders, and a table of it all.

The stages are windows of one run. Iterations and samples count on, so a stage loads the last
checkpoint of the stage before it as Megatron resumes any run: weights, MuonClip's momenta and fp32
weights, step count, random states, place in the schedule. ``--override-opt-param-scheduler`` takes
the schedule from the command line and keeps only the count of samples; so each stage's schedule is
one of style WSD over the whole run that is flat until its own decay begins. ``--finetune`` would
drop the optimizer state, a fresh count its bias correction and the clip's telemetry.
A warm-up inside the run is a line through two points: where the last stage ended and ``lr``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.presets import load_preset
from megatron_k2.training.recipes.recipe import Arguments, Evaluation, Recipe, Stage, expand

TRAIN_MODULE = "megatron_k2.training.pretrain"
_HELDOUT_NAME = "heldout"  # of the validation set, in the log
# Arguments that change no number of the training: a stage may go on with others.
_FREE = frozenset(
    {"save_interval", "log_interval", "tensorboard_log_interval", "eval_interval", "eval_iters"}
    | {"tokenizer_model", "num_workers", "async_save", "micro_batch_size"}
    | {f"{axis}_parallel_size" for axis in ("context", "tensor_model", "pipeline_model")}
    | {"expert_model_parallel_size", "expert_tensor_parallel_size"}
)
_YARN = "rotary_scaling_factor"  # 1 leaves every frequency as it is


@dataclass(frozen=True)
class PlannedStage:
    """A stage and where it stands in the run."""

    stage: Stage
    index: int
    first_step: int
    first_sample: int
    """Sequences that the stages before it read, each of its own length."""
    lr_before: float
    """Where the stage before it ends; 0 for the first."""

    @property
    def last_step(self) -> int:
        """The run's count of iterations when the stage is done."""
        return self.first_step + self.stage.steps

    @property
    def folder_name(self) -> str:
        """Name of the stage's folder, in order."""
        return f"{self.index + 1:02d}-{self.stage.name}"


def plan_stages(recipe: Recipe) -> tuple[PlannedStage, ...]:
    """Return the stages with their places in the run.

    Raises:
        ValueError: the samples before a stage are no multiple of its batch.
    """
    planned: list[PlannedStage] = []
    step = sample = 0
    before = 0.0
    for index, stage in enumerate(recipe.stages):
        if sample % stage.global_batch_size:
            raise ValueError(
                f"stage {stage.name}: global_batch_size {stage.global_batch_size} must divide the "
                f"{sample:,} sequences before it: upstream counts schedules in batches"
            )
        planned.append(PlannedStage(stage, index, step, sample, before))
        step += stage.steps
        sample += stage.steps * stage.global_batch_size
        before = stage.lr_end
    return tuple(planned)


def flags(arguments: Mapping[str, object]) -> list[str]:
    """Return a command line: x_y = True is --x-y, a list its values, anything else one value."""
    line: list[str] = []
    for key, value in arguments.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            line.append(flag)
        elif isinstance(value, list) and len(value) > 1:
            line += [flag, *map(str, value)]
        elif isinstance(value, list):
            line.append(f"{flag}={value[0]}")
        else:
            # One word, so that a value that begins with a minus sign is not taken for a flag.
            line.append(f"{flag}={value}")
    return line


def schedule_arguments(planned: PlannedStage) -> Arguments:
    """Return the learning-rate schedule of one stage, over the counts of the whole run."""
    stage = planned.stage
    offset = planned.first_sample // stage.global_batch_size  # in batches of this stage
    end = offset + stage.steps
    schedule: Arguments = {"lr": stage.lr, "min_lr": stage.lr_end, "lr_decay_iters": end}
    if stage.decay is None:
        schedule |= {"lr_decay_style": "constant"}
    else:
        schedule |= {"lr_decay_style": "WSD", "lr_wsd_decay_style": stage.decay}
        schedule |= {"lr_wsd_decay_iters": stage.decay_steps}
    warm = offset + stage.warmup_steps if stage.warmup_steps else 0
    schedule["lr_warmup_iters"] = warm
    if warm:
        rise = (stage.lr - planned.lr_before) / stage.warmup_steps
        schedule["lr_warmup_init"] = planned.lr_before - rise * offset
    return schedule


@dataclass(frozen=True)
class Run:
    """A planned recipe with its output folder and the variables of its paths."""

    recipe: Recipe
    stages: tuple[PlannedStage, ...]
    output: Path
    variables: Mapping[str, str]
    nodes: int = 1

    def checkpoints(self, planned: PlannedStage) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.output / "stages" / planned.folder_name

    def _base(self, arguments: Arguments) -> Arguments:
        base = {
            "k2_preset": self.recipe.preset,
            **self.recipe.layout,
            **arguments,
            "data_cache_path": str(self.output / "cache"),
        }
        if "load_hf" in self.recipe.start:  # the folder's config.json gives the model's shape
            base["k2_load_hf"] = self.recipe.start["load_hf"]
        return base

    def stage_arguments(self, planned: PlannedStage, resumes: bool = False) -> list[str]:
        """Return the command line of a stage.

        Args:
            planned: the stage.
            resumes: whether the stage has a checkpoint of its own to go on from.

        Raises:
            ValueError: a path names a variable that is not set.
        """
        stage, own = planned.stage, str(self.checkpoints(planned))
        arguments = {
            **self._base(stage.arguments),
            **schedule_arguments(planned),
            "train_iters": planned.last_step,
            "k2_stage_start": planned.first_step,
            "override_opt_param_scheduler": True,
            "data_path": _path_words(stage),
            "save": own,
            "tensorboard_dir": str(self.output / "tensorboard"),
        }
        if resumes:
            arguments["load"] = own
        elif planned.index:
            arguments["load"] = str(self.checkpoints(self.stages[planned.index - 1]))
        elif "load" in self.recipe.start:
            arguments |= {"load": self.recipe.start["load"], "finetune": True}
        return [expand(word, self.variables) for word in flags(arguments)]

    def evaluation_arguments(self, evaluation: Evaluation, after: PlannedStage) -> list[str]:
        """Return the command line that evaluates the last checkpoint of a stage.

        Without a number of sequences it is one pass over the set, whatever its size: upstream's
        full validation, which takes a list of sets and reads one sequence a rank at a time, too
        few for an interleaved pipeline.

        Raises:
            ValueError: a path names a variable that is not set.
        """
        arguments = {
            **self._base(evaluation.arguments),
            "train_iters": after.last_step,
            "skip_train": True,
            "no_load_rng": True,
            "load": str(self.checkpoints(after)),
            "ckpt_step": after.last_step,
            "valid_data_path": [evaluation.data],
            "eval_interval": after.last_step,
            "k2_loss_beyond": evaluation.beyond,
        }
        for key in ("save_interval", "async_save", "split", "eval_iters"):
            arguments.pop(key, None)
        at_once = evaluation.sequences or self._data_parallel_size(arguments)
        arguments |= dict.fromkeys(("micro_batch_size", "eval_micro_batch_size"), 1)
        arguments |= dict.fromkeys(("global_batch_size", "eval_global_batch_size"), at_once)
        if evaluation.sequences:
            arguments["eval_iters"] = 1
        else:
            arguments |= {
                "full_validation": True,
                "multiple_validation_sets": True,
                "validation_set_names": [_HELDOUT_NAME],
            }
        return [expand(word, self.variables) for word in flags(arguments)]

    def _data_parallel_size(self, arguments: Arguments) -> int:
        """Return how many ranks read different sequences."""
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        ranks = self.nodes * self.recipe.processes
        for size in (*sizes, "context_parallel_size"):
            ranks //= arguments.get(size, 1)
        return max(1, ranks)

    def evaluations(self) -> list[tuple[Evaluation, PlannedStage]]:
        """Return every evaluation with the stage it follows, in order of the run."""
        return [
            (evaluation, planned)
            for planned in self.stages
            for evaluation in self.recipe.evaluations
            if planned.stage.name in evaluation.after
        ]

    def identity(self, planned: PlannedStage) -> Arguments:
        """Return what decides a stage's numbers; the layout and the places of files may change."""
        stage = planned.stage
        return {
            "preset": self.recipe.preset,
            "first_step": planned.first_step,
            "steps": stage.steps,
            **schedule_arguments(planned),
            **{key: value for key, value in stage.arguments.items() if key not in _FREE},
            "seq_length": stage.seq_length,
            "global_batch_size": stage.global_batch_size,
            "data": [list(pair) for pair in stage.data],
        }


def _path_words(stage: Stage) -> list[str]:
    """Return ``--data-path``: one prefix, or weights and prefixes in turn."""
    words: list[str] = []
    for weight, prefix in stage.data:
        words += [prefix] if weight is None else [repr(weight), prefix]
    return words


def table(run: Run) -> str:
    """Return the stages as text: steps, tokens, rates, lengths, batch, YaRN and data."""
    head = ("stage", "steps", "tokens", "learning rate", "sequence", "batch", "YaRN", "data")
    rows = [head, *(_row(run.recipe, planned) for planned in run.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    tokens = sum(one.stage.steps * one.stage.tokens_per_step for one in run.stages)
    return "\n".join([*lines, f"in all {run.stages[-1].last_step:,} steps, {tokens:,} tokens"])


def _row(recipe: Recipe, planned: PlannedStage) -> tuple[str, ...]:
    stage = planned.stage
    rates = f"{stage.lr:.4g}"
    if stage.warmup_steps:
        rates = f"{planned.lr_before:.4g} -> {rates} in {stage.warmup_steps:,}"
    if stage.decay:
        rates += f" -> {stage.lr_end:.4g} {stage.decay}"
    preset = load_preset(recipe.preset)
    factor = stage.arguments.get(_YARN) or preset.value(_YARN, 1.0)
    return (
        stage.name,
        f"{planned.first_step:,} + {stage.steps:,}",
        f"{stage.steps * stage.tokens_per_step:,}",
        rates,
        f"{stage.seq_length:,}",
        f"{stage.global_batch_size:,}",
        "off" if factor == 1.0 else f"x {factor:g}",
        " ".join(_path_words(stage)),
    )
