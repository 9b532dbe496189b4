"""The run file: what an RL run is, declared in TOML, every key checked before anything starts.

Unknown keys are refused, so that a misspelt one does not silently do nothing.
``run_tables.py`` says what each table may hold.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from megatron_k2.inputs import UsageError, read_toml
from megatron_k2.rl.run_critic import CriticRules
from megatron_k2.rl.run_play import Loops, Probing, Rollout, Source
from megatron_k2.rl.run_tables import Evaluation, Objective, Ptx, Rewards, Run
from megatron_k2.rl.schedules import schedule_from

TABLES: dict[str, type[Any]] = {
    "objective": Objective,
    "rewards": Rewards,
    "rollout": Rollout,
    "repetition": Loops,
    "ptx": Ptx,
    "critic": CriticRules,
    "probing": Probing,
    "evaluation": Evaluation,
}


def read_run(path: Path) -> Run:
    """Return the run of a TOML file.

    Raises:
        UsageError: it cannot be read, a key is unknown, or a value is out of its range.
    """
    try:
        given = read_toml(path)
        return run_from(given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--k2-rl-run {str(error).replace(f'{path}: ', '')} ({path})") from error


def run_from(given: dict[str, Any]) -> Run:
    """Return the run of a table.

    Raises:
        ValueError: a key is unknown or missing, or a value is out of its range.
    """
    for name in ("run", *TABLES):
        if not isinstance(given.get(name, {}), dict):
            raise ValueError(f"{name} is a table: [{name}]")
    fields = dict(given.get("run", {}))
    if misplaced := sorted(set(fields) & {"environments", *TABLES}):
        name = misplaced[0]
        own = "[[environments]]" if name == "environments" else f"[{name}]"
        raise ValueError(f"[run] {name}: a table of its own, {own}")
    unknown = sorted(set(given) - {"run", "environments", *TABLES})
    if unknown:
        raise ValueError(f"table [{unknown[0]}] is none of run, environments, {', '.join(TABLES)}")
    for name, kind in TABLES.items():
        fields[name] = _table(name, kind, given.get(name, {}))
    sources = given.get("environments", [])
    if not isinstance(sources, list) or not all(isinstance(one, dict) for one in sources):
        raise ValueError("environments are tables of a list: [[environments]]")
    fields["environments"] = tuple(_table("environments", Source, one) for one in sources)
    return _table("run", Run, fields)


def _table[Table](name: str, kind: type[Table], given: dict[str, Any]) -> Table:
    known = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"[{name}] {unknown[0]} is none of {', '.join(known)}")
    values = dict(given)
    for key, value in given.items():
        values[key] = _value(f"[{name}] {key}", known[key], value)
    missing = [
        key
        for key, one in known.items()
        if key not in values
        and one.default is dataclasses.MISSING
        and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"[{name}] {missing[0]} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"[{name}] {error}") from error


def _value(place: str, known: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value as its field's type."""
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "dict[str, Any]": (dict,),
    }
    kind = str(known.type)
    if kind == "Schedule":
        try:
            return schedule_from(value)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if kind == "tuple[str, ...]":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{place} = {value!r} is no list of names")
        return tuple(value)
    wanted = kinds.get(kind)
    if wanted is None:
        return value
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise ValueError(f"{place} = {value!r} is no {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} = {value} is not finite")
    try:
        return float(value) if isinstance(value, int) and kind == "float" else value
    except OverflowError:
        raise ValueError(f"{place} is too large for a {kind}") from None
