"""A recipe made small by one of its own ``[scale.NAME]`` tables.

    preset                      the small model
    lengths, batch, tokens      divide sequence lengths and positions, the global batch, the tokens
    lr                          multiplies the learning rates
    warmup                      divides the steps of a warm-up
    text                        the built-in text that gives the variables of the data
    [.layout] [.start]          replace the recipe's tables whole
    [.arguments]                are laid over the recipe's
    [.stages.STAGE]             keys of a stage that replace its own, not divided again
    [.evaluations.NAME]         the same for an evaluation

Lengths that belong together (positions before YaRN, sequences, where an evaluation splits) shrink
by one number, so that the small run meets the same stretch factors as the large one.
"""

from __future__ import annotations

import copy
from typing import Any

Table = dict[str, Any]

LENGTHS = ("seq_length", "k2_yarn_original_max_position_embeddings", "max_position_embeddings")
_KEYS = frozenset(
    {"preset", "lengths", "batch", "tokens", "lr", "warmup", "text", "layout", "start"}
    | {"arguments", "stages", "evaluations"}
)


def scaled(table: Table, scale: str | None) -> Table:
    """Return a recipe's table without its scales, made small by one of them.

    Args:
        table: of the whole file.
        scale: one of its ``[scale.*]``, None for none.

    Raises:
        ValueError: no such scale, an unknown key, or a length that does not divide.
    """
    recipe = copy.deepcopy(table)
    scales = recipe.pop("scale", {})
    if scale is None:
        return recipe
    if scale not in scales:
        raise ValueError(f"--scale {scale}: the recipe has {', '.join(scales) or 'none'}")
    by = scales[scale]
    if unknown := sorted(by.keys() - _KEYS):
        raise ValueError(f"[scale.{scale}] has unknown keys {', '.join(unknown)}")
    for arguments in _all_arguments(recipe):
        _divide_(arguments, LENGTHS, by.get("lengths", 1))
        _divide_(arguments, ("global_batch_size",), by.get("batch", 1))
    for stage in recipe.get("stages", []):
        _divide_(stage, ("warmup_steps",), by.get("warmup", 1))
        for key in ("tokens", "decay_tokens"):
            if key in stage:
                stage[key] /= by.get("tokens", 1)
        for key in ("lr", "lr_end"):
            if key in stage:
                stage[key] = float(f"{stage[key] * by.get('lr', 1):.9g}")  # readable
    for evaluation in recipe.get("evaluations", []):
        _divide_(evaluation, ("beyond",), by.get("lengths", 1))
    for key in ("preset", "text", "layout", "start"):
        if key in by:
            recipe[key] = by[key]
    recipe["arguments"] = {**recipe.get("arguments", {}), **by.get("arguments", {})}
    for kind in ("stages", "evaluations"):
        _replace_(recipe.get(kind, []), by.get(kind, {}), f"[scale.{scale}.{kind}]")
    return recipe


def _all_arguments(recipe: Table) -> list[Table]:
    entries = [*recipe.get("stages", []), *recipe.get("evaluations", [])]
    tables = [recipe.get("arguments", {}), *(entry.get("arguments", {}) for entry in entries)]
    return [one for one in tables if isinstance(one, dict)]


def _divide_(table: Table, keys: tuple[str, ...], divisor: int) -> None:
    for key in keys:
        if key not in table:
            continue
        if table[key] % divisor:
            raise ValueError(f"{key} {table[key]} does not divide by the scale's {divisor}")
        table[key] //= divisor


def _replace_(entries: list[Table], changes: Table, where: str) -> None:
    """Lay changes over the entries that they name."""
    by_name = {str(entry.get("name")): entry for entry in entries}
    for name, change in changes.items():
        if name not in by_name:
            raise ValueError(f"{where} {name}: no such entry; there are {', '.join(by_name)}")
        entry = by_name[name]
        arguments = {**entry.get("arguments", {}), **change.get("arguments", {})}
        if change.keys() & {"tokens", "steps"}:
            entry.pop("tokens", None)
            entry.pop("steps", None)
        entry |= {**change, "arguments": arguments}
