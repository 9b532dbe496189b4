"""A recipe: one TOML file that declares every stage of a training, and how it is scaled down.

    name, summary, preset       of the model
    [arguments]                 of every stage; a key x_y is Megatron's or K2's flag --x-y
    [layout]                    processes a node, parallel layout and memory: the cluster's part
    [start]                     load_hf or load: weights to begin with (no optimizer state)
    [[stages]]                  tokens or steps, learning rate, data, arguments of their own
    [[evaluations]]             held-out sets that are evaluated after stages, split at a position
    [scale.NAME]                divisors and replacements that make the same file small (scaling.py)

Every unknown key is refused here; every argument is shown to Megatron's own parser before the
first stage runs. ``${NAME}`` in a text is a variable of the environment. Pure: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.inputs import read_toml
from megatron_k2.presets import load_preset
from megatron_k2.training.recipes.scale import scaled

Arguments = dict[str, Any]
_Blend = tuple[tuple[float | None, str], ...]

_DECAYS = ("linear", "cosine", "exponential", "minus_sqrt")  # --lr-wsd-decay-style
_START_KEYS = ("load_hf", "load")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
# Flags that the runner sets for each stage.
_OWN_FLAGS = frozenset(
    {"train_iters", "train_samples", "lr", "min_lr", "lr_decay_style", "lr_decay_iters"}
    | {"lr_warmup_iters", "lr_warmup_init", "lr_wsd_decay_iters", "lr_wsd_decay_style"}
    | {"save", "load", "finetune", "data_path", "train_data_path", "tensorboard_dir"}
    | {"override_opt_param_scheduler", "k2_stage_start", "k2_preset", "k2_load_hf"}
    | {"k2_loss_beyond", "skip_train", "ckpt_step", "no_load_rng", "valid_data_path"}
)


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a schedule, data and arguments of its own."""

    name: str
    source: str
    steps: int
    seq_length: int
    global_batch_size: int
    lr: float
    """At its begin, or after its warm-up."""
    lr_end: float
    decay: str | None
    decay_steps: int
    """The last so many steps lead from ``lr`` to ``lr_end``."""
    warmup_steps: int
    data: _Blend
    arguments: Arguments
    """Of every stage and its own."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.seq_length * self.global_batch_size


@dataclass(frozen=True)
class Evaluation:
    """A held-out set, evaluated after some stages; the loss is split at a position."""

    name: str
    after: tuple[str, ...]
    data: str
    beyond: int
    sequences: int
    """How many are read; 0 all of the set, in one pass."""
    arguments: Arguments


@dataclass(frozen=True)
class Recipe:
    """What a file declares, scaled."""

    name: str
    summary: str
    preset: str
    processes: int
    """Of a node."""
    layout: Arguments
    start: dict[str, str]
    text: str | None
    """A built-in text that gives the variables of the data, None where they are the user's."""
    stages: tuple[Stage, ...]
    evaluations: tuple[Evaluation, ...] = field(default=())


def read_recipe(path: Path, scale: str | None = None) -> Recipe:
    """Read, scale and check a recipe.

    Args:
        path: the TOML file.
        scale: name of one of its ``[scale.*]`` tables; None as it stands.

    Raises:
        ValueError: not TOML, an unknown or missing key, a value out of range.
    """
    table = read_toml(path)
    try:
        return parse_recipe(scaled(table, scale))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_recipe(table: dict[str, Any]) -> Recipe:
    """Check a recipe's table, already scaled.

    Raises:
        ValueError: as ``read_recipe``.
    """
    _check_keys("recipe", table, {"name", "summary", "preset", "stages"}, _OPTIONAL)
    preset = load_preset(table["preset"])
    common = _arguments("[arguments]", table.get("arguments", {}))
    layout = dict(table.get("layout", {}))
    processes = layout.pop("processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise ValueError(f"[layout] processes {processes} must be a number of at least 1")
    defaults = {name: one.value for name, one in preset.fields.items()}
    layout = _arguments("[layout]", layout)
    stages = [_stage(entry, common, {**defaults, **layout}) for entry in table["stages"]]
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"[[stages]] need names that differ, found {names}")
    start = table.get("start", {})
    _check_keys("[start]", start, set(), set(_START_KEYS))
    if len(start) > 1:
        raise ValueError("[start] takes one of load_hf and load")
    recipe = Recipe(
        name=table["name"],
        summary=table["summary"],
        preset=table["preset"],
        processes=processes,
        layout=layout,
        start=start,
        text=table.get("text"),
        stages=tuple(stages),
        evaluations=tuple(
            _evaluation(entry, common, names) for entry in table.get("evaluations", [])
        ),
    )
    _check_rates(recipe)
    return recipe


_OPTIONAL = {"arguments", "layout", "start", "text", "evaluations"}


def _check_keys(
    where: str, table: Mapping[str, Any], needed: Set[str], optional: Set[str] = frozenset()
) -> None:
    """Refuse keys that are missing or unknown.

    Raises:
        ValueError: naming them and what is allowed.
    """
    if missing := sorted(needed - table.keys()):
        raise ValueError(f"{where} has no {', '.join(missing)}")
    if unknown := sorted(table.keys() - needed - optional):
        allowed = ", ".join(sorted(needed | optional))
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; allowed: {allowed}")


def _arguments(where: str, table: Mapping[str, Any]) -> Arguments:
    for key, value in table.items():
        if key in _OWN_FLAGS:
            raise ValueError(f"{where} {key}: the runner sets --{key.replace('_', '-')} itself")
        if value is False or isinstance(value, dict):
            raise ValueError(f"{where} {key} = {value}: leave the flag out, or give its opposite")
    return dict(table)


def _stage(entry: Mapping[str, Any], common: Arguments, defaults: Arguments) -> Stage:
    where = f"stage {entry.get('name', '?')}"
    optional = {"tokens", "steps", "lr_end", "decay", "decay_tokens", "warmup_steps", "arguments"}
    _check_keys(where, entry, {"name", "source", "lr", "data"}, optional)
    if not _NAME.fullmatch(entry["name"]):
        raise ValueError(f"{where}: names are of a-z, 0-9 and -")
    arguments = {**common, **_arguments(where, entry.get("arguments", {}))}
    seq_length, batch = (
        _whole(f"{where}: {key}", {**defaults, **arguments}.get(key))
        for key in ("seq_length", "global_batch_size")
    )
    if ("tokens" in entry) == ("steps" in entry):
        raise ValueError(f"{where} needs tokens or steps, and not both")
    steps = _steps(where, entry.get("tokens"), seq_length * batch, entry.get("steps"))
    warmup = entry.get("warmup_steps", 0)
    if not isinstance(warmup, int) or not 0 <= warmup < steps:
        raise ValueError(f"{where}: warmup_steps {warmup} must be from 0 to below its {steps}")
    lr, lr_end = float(entry["lr"]), float(entry.get("lr_end", entry["lr"]))
    if not 0 <= lr_end <= lr:
        raise ValueError(f"{where}: lr_end {lr_end:g} must be from 0 to lr {lr:g}")
    decay = entry.get("decay")
    if (lr_end < lr) != (decay is not None) or (decay is not None and decay not in _DECAYS):
        raise ValueError(f"{where}: lr_end below lr needs a decay, one of {', '.join(_DECAYS)}")
    decays = _steps(where, entry.get("decay_tokens"), seq_length * batch, steps - warmup)
    if decays > steps - warmup:
        raise ValueError(f"{where}: decay_tokens are more than the stage has after its warm-up")
    return Stage(
        name=entry["name"],
        source=entry["source"],
        steps=steps,
        seq_length=seq_length,
        global_batch_size=batch,
        lr=lr,
        lr_end=lr_end,
        decay=decay,
        decay_steps=decays if decay else 0,
        warmup_steps=warmup,
        data=_blend(where, entry["data"]),
        arguments=arguments,
    )


def _whole(what: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} = {value} must be a whole number of at least 1; set it")
    return value


def _steps(where: str, tokens: float | None, tokens_per_step: int, otherwise: Any) -> int:
    """Return the nearest number of steps to a number of tokens."""
    if tokens is None:
        return _whole(f"{where}: steps", otherwise)
    steps = round(tokens / tokens_per_step)
    if steps < 1:
        raise ValueError(f"{where}: {tokens:g} tokens are less than half a step")
    return steps


def _blend(where: str, data: Any) -> _Blend:
    """Return (weight, prefix) pairs; a bare prefix has no weight."""
    parts = [data] if isinstance(data, str) else data
    pairs = tuple((None, one) if isinstance(one, str) else tuple(one) for one in parts)
    is_plain = len(pairs) == 1 and pairs[0][0] is None
    if not is_plain and not all(
        len(pair) == 2 and isinstance(pair[0], int | float) and pair[0] > 0 for pair in pairs
    ):
        raise ValueError(f"{where}: data must be a prefix, or pairs of a weight above 0 and one")
    return pairs


def _evaluation(entry: Mapping[str, Any], common: Arguments, stages: list[str]) -> Evaluation:
    where = f"evaluation {entry.get('name', '?')}"
    optional = {"sequences", "arguments", "source"}
    _check_keys(where, entry, {"name", "after", "data", "beyond"}, optional)
    sequences = entry.get("sequences", 0)
    if not isinstance(sequences, int) or sequences < 0:
        raise ValueError(f"{where}: sequences {sequences} must be a whole number; 0 reads all")
    if unknown := [name for name in entry["after"] if name not in stages]:
        raise ValueError(f"{where}: after {', '.join(unknown)}, which is no stage")
    return Evaluation(
        name=entry["name"],
        after=tuple(entry["after"]),
        data=entry["data"],
        beyond=_whole(f"{where}: beyond", entry["beyond"]),
        sequences=sequences,
        arguments={**common, **_arguments(where, entry.get("arguments", {}))},
    )


def _check_rates(recipe: Recipe) -> None:
    """Refuse a jump of the learning rate, and rates that the optimizer cannot follow."""
    for before, stage in zip(recipe.stages, recipe.stages[1:], strict=False):
        if stage.warmup_steps == 0 and abs(stage.lr - before.lr_end) > 1e-6 * before.lr_end:
            raise ValueError(
                f"stage {stage.name}: lr {stage.lr:g} is not {before.lr_end:g}, where stage "
                f"{before.name} ends; change one, or give warmup_steps"
            )
    rates = {(stage.lr, stage.lr_end) for stage in recipe.stages}
    optimizers = {stage.arguments.get("optimizer", "adam") for stage in recipe.stages}
    if len(rates) > 1 and optimizers != {"muonclip"}:
        raise ValueError(
            'stages with other learning rates need [arguments] optimizer = "muonclip": upstream\'s '
            "optimizers find their saved parameter groups by --lr and --min-lr"
        )


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Fill in ``${NAME}``.

    Raises:
        ValueError: a variable that is not there.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in variables:
            raise ValueError(f"{text}: set the environment variable {found[1]}")
        return variables[found[1]]

    return _VARIABLE.sub(value, text)
