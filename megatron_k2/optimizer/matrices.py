"""Which matrices a stored parameter holds, and which optimizer each parameter gets.

Megatron stores several matrices in one tensor: gate and up projections in ``linear_fc1``, all
local experts in one [experts, rows, columns] tensor, the heads' content and rotary parts in the
MLA up-projections. Muon's update depends on what is taken for one matrix, so it is declared here,
by name pattern, once. Kimi K2 (arXiv 2507.20534) and Moonlight (arXiv 2502.16982) orthogonalise
each projection whole and give embedding, head and norms to AdamW; ``split`` can also cut the
up-projections by part or by head. A parameter of two or more axes that no rule names is refused.
A model's own layers are declared by ``declare_matrices``.
No Megatron import; shapes are those of the tensor given, whole or one tensor-parallel rank's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import gcd
from typing import Any, Literal, get_args

from torch import Tensor

Split = Literal["whole", "part", "head"]
Algorithm = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Cut:
    """How the rows of a stored matrix are cut: groups of consecutive parts.

    ``linear_kv_up_proj`` has one group a head, of (128 content rows, 128 value rows);
    ``linear_fc1`` one group of gate and up rows.

    Attributes:
        sizes: rows of each part of a group; with ``groups``, their shares of the height.
        groups: how many; None for as many as fit (a tensor-parallel rank has fewer heads).
        by: ``part`` joins the same part of all groups into one matrix, ``head`` makes each part of
            each group a matrix of its own.
    """

    sizes: tuple[int, ...]
    groups: int | None = None
    by: Literal["part", "head"] = "part"

    def of_rows(self, rows: int) -> tuple[int, tuple[int, ...]]:
        """Return the number of groups and the rows of each part in a matrix of so many rows.

        Raises:
            ValueError: the rows are not whole groups.
        """
        unit = sum(self.sizes) * (self.groups or 1)
        count, rest = divmod(rows, unit)
        if rest or count == 0:
            raise ValueError(f"{rows} rows are not a multiple of {unit}, of parts {self.sizes}")
        if self.groups is None:
            return count, self.sizes
        return self.groups, tuple(count * size for size in self.sizes)


GATE_AND_UP = Cut((1, 1), groups=1)


@dataclass(frozen=True)
class Rule:
    """What is done with the parameters whose name matches.

    Attributes:
        pattern: of the name, as in ``fnmatch``; the first rule that matches counts.
        algorithm: ``muon`` or ``adamw``.
        cut: None for one matrix (an [experts, rows, columns] tensor: one each).
        why: printed in the table at start.
    """

    pattern: str
    algorithm: Algorithm
    cut: Cut | None = None
    why: str = ""


@dataclass(frozen=True)
class Assignment:
    """A parameter and the rule that names it."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    matrices: tuple[tuple[int, int, int], ...] = field(default=())
    """(how many, rows, columns) of each kind of matrix; empty under AdamW."""


def kimi_rules(
    qk_head_dim: int, qk_pos_emb_head_dim: int, v_head_dim: int, split: Split = "whole"
) -> tuple[Rule, ...]:
    """Return the rules of a Kimi K2 model.

    Args:
        qk_head_dim: content width of a query and key head.
        qk_pos_emb_head_dim: rotary width.
        v_head_dim: width of a value head.
        split: what one matrix of the MLA up-projections is: ``whole`` the stored projection (the
            reports), ``part`` the content or rotary or value rows of all heads, ``head`` those of
            one head.

    Raises:
        ValueError: unknown ``split``.
    """
    if split not in get_args(Split):
        raise ValueError(f"--k2-muon-split {split!r} is not one of {', '.join(get_args(Split))}")
    query = key_value = None
    if split != "whole":
        query = Cut((qk_head_dim, qk_pos_emb_head_dim), by=split)
        key_value = Cut((qk_head_dim, v_head_dim), by=split)
    return (
        Rule("*embedding.word_embeddings.weight", "adamw", why="embedding"),
        Rule("*embedding.position_embeddings.weight", "adamw", why="learned positions"),
        Rule("*output_layer.weight", "adamw", why="output layer"),
        Rule("*norm.weight", "adamw", why="norm gain"),
        Rule("*.layer_norm_weight", "adamw", why="norm gain, fused into a linear"),
        Rule("*.bias", "adamw", why="bias"),
        Rule("*.lora_A", "muon", why="adapter, down"),
        Rule("*.linear_fc1.lora_B", "muon", GATE_AND_UP, "adapter, gate and up apart"),
        Rule("*.linear_q_proj.lora_B", "muon", query, f"adapter of the query, {split}"),
        Rule("*.linear_q_up_proj.lora_B", "muon", query, f"adapter of the query, {split}"),
        Rule("*.linear_kv_up_proj.lora_B", "muon", key_value, f"adapter of key-value, {split}"),
        Rule("*.lora_B", "muon", why="adapter, up"),
        Rule("*.linear_q_proj.weight", "muon", query, f"query projection, {split}"),
        Rule("*.linear_q_up_proj.weight", "muon", query, f"query up-projection, {split}"),
        Rule("*.linear_kv_up_proj.weight", "muon", key_value, f"key-value up-projection, {split}"),
        Rule("*.linear_q_down_proj.weight", "muon", why="query latent"),
        Rule("*.linear_kv_down_proj.weight", "muon", why="key-value latent and rotary key"),
        Rule("*.linear_proj.weight", "muon", why="attention output"),
        Rule("*.eh_proj.weight", "muon", why="multi-token prediction's projection"),
        Rule("*.mlp.router.weight", "muon", why="router"),
        Rule("*.linear_fc1.weight*", "muon", GATE_AND_UP, "gate and up apart"),
        Rule("*.linear_fc2.weight*", "muon", why="down projection"),
    )


def model_rules(config: Any, split: Split = "whole", split_qkv: bool = True) -> tuple[Rule, ...]:
    """Return the rules of a Megatron model with latent or grouped-query attention.

    Args:
        config: its ``TransformerConfig``.
        split: as in ``kimi_rules``; under ``head`` also each head of ``linear_qkv`` is apart.
        split_qkv: of ``linear_qkv``, query, key and value are three matrices; False
            (``--muon-no-split-qkv``) for one.

    Raises:
        ValueError: unknown ``split``.
    """
    rules = _attention_rules(config, split, split_qkv)
    if config.gated_linear_unit:
        return rules
    return (
        Rule("*.linear_fc1.weight*", "muon", why="up projection, no gate"),
        Rule("*.linear_fc1.lora_B", "muon", why="adapter, up"),
        *rules,
    )


def _attention_rules(config: Any, split: Split, split_qkv: bool) -> tuple[Rule, ...]:
    """Return a model's rules, its feed-forward taken for gated."""
    if config.multi_latent_attention:
        rules = kimi_rules(config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim, split)
        if config.q_lora_rank is None:
            return rules
        # --mla-down-proj-fusion stores both down-projections in one tensor; under tensor
        # parallelism each rank has its share of the one and then of the other.
        latents = (config.q_lora_rank, config.kv_lora_rank + config.qk_pos_emb_head_dim)
        unit = gcd(*latents)
        cut = Cut(tuple(one // unit for one in latents), groups=1)
        why = "query latent and key-value latent, apart"
        return (Rule("*.linear_qkv_down_proj.weight", "muon", cut, why), *rules)
    width = config.kv_channels
    heads = config.num_attention_heads // config.num_query_groups
    qkv: Cut | None = Cut((heads * width, width, width))
    why = "query, key and value apart"
    if not split_qkv:
        qkv, why = None, "query, key and value as one"
    elif split == "head":
        qkv, why = Cut((width,) * (heads + 2), by="head"), "each query, key and value head apart"
    rule = Rule("*.linear_qkv.weight", "muon", qkv, why)
    return (rule, *kimi_rules(width, 0, width, split))


_DECLARED: list[Rule] = []


def declare_matrices(*rules: Rule) -> None:
    """Say what parameters of your own layers are; such rules come before the model's.

    Example: ``declare_matrices(Rule("*.my_gate.weight", "muon", why="gate of mine"))`` in
    ``my_layers.py``, and ``--k2-muon-rule my_layers:muon``.
    """
    _DECLARED.extend(rule for rule in rules if rule not in _DECLARED)


def declared_matrices() -> tuple[Rule, ...]:
    """Return what ``declare_matrices`` was told, in order."""
    return tuple(_DECLARED)


def assign(name: str, shape: Sequence[int], rules: Iterable[Rule]) -> Assignment:
    """Return what is done with one parameter.

    Args:
        name: as in ``named_parameters``, prefixes of wrappers included.
        shape: [n], [rows, columns] or [experts, rows, columns].
        rules: in order; the first match counts.

    Raises:
        ValueError: no rule names a parameter of two or more axes, or its shape does not fit.
    """
    shape = tuple(shape)
    for rule in rules:
        if fnmatchcase(name, rule.pattern):
            break
    else:
        if len(shape) > 1:
            raise ValueError(
                f"no rule says what {name} {list(shape)} is: name it for muon or adamw by "
                "declare_matrices (megatron_k2/optimizer/matrices.py), in a module that "
                "--k2-muon-rule MODULE:muon imports"
            )
        rule = Rule(name, "adamw", why="a vector")
    if rule.algorithm == "adamw":
        return Assignment(name, shape, rule)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} {list(shape)} is no matrix and no stack of matrices")
    try:
        kinds = _kinds(rule.cut, shape)
    except ValueError as error:
        raise ValueError(f"{name} {list(shape)}: {error}") from error
    return Assignment(name, shape, rule, kinds)


def _kinds(cut: Cut | None, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    experts = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:]
    if cut is None:
        return ((experts, rows, columns),)
    groups, sizes = cut.of_rows(rows)
    if cut.by == "head":
        return tuple((experts * groups, size, columns) for size in sizes)
    return tuple((experts, groups * size, columns) for size in sizes)


def cut_matrices(stored: Tensor, cut: Cut | None) -> list[Tensor]:
    """Return the matrices of a stored tensor, a batch of each kind.

    Args:
        stored: [rows, columns] or [experts, rows, columns].
        cut: of the parameter's rule.

    Returns:
        [batch, rows, columns] each, in the order of ``Assignment.matrices``: views where the
        memory order allows, else copies.
    """
    stack = stored if stored.ndim == 3 else stored.unsqueeze(0)
    if cut is None:
        return [stack]
    parts = _parts(stack, cut)
    if cut.by == "head":
        return [part.flatten(0, 1) for part in parts]
    return [part.flatten(1, 2) for part in parts]


def _parts(stack: Tensor, cut: Cut) -> tuple[Tensor, ...]:
    """Return views [experts, groups, rows of the part, columns] of [experts, rows, columns]."""
    groups, sizes = cut.of_rows(stack.shape[1])
    return stack.unflatten(1, (groups, -1)).split(sizes, dim=2)


def join_matrices_(stored: Tensor, cut: Cut | None, matrices: Sequence[Tensor]) -> Tensor:
    """Write batches of matrices, as ``cut_matrices`` returned them, back; returns ``stored``."""
    stack = stored if stored.ndim == 3 else stored.unsqueeze(0)
    if cut is None:
        stack.copy_(matrices[0])
        return stored
    for part, matrix in zip(_parts(stack, cut), matrices, strict=True):
        part.copy_(matrix.reshape(part.shape))
    return stored


def add_matrices_(
    stored: Tensor, cut: Cut | None, matrices: Sequence[Tensor], alpha: float
) -> Tensor:
    """Add ``alpha`` times batches of matrices to where ``cut_matrices`` took them from."""
    stack = stored if stored.ndim == 3 else stored.unsqueeze(0)
    parts = (stack,) if cut is None else _parts(stack, cut)
    for part, matrix in zip(parts, matrices, strict=True):
        part.add_(matrix.reshape(part.shape), alpha=alpha)
    return stored


def assignment_table(assignments: Iterable[Assignment]) -> str:
    """Return a table for people: parameters of the same kind counted together, shapes as given."""
    kinds: dict[tuple[str, str, str], list[Assignment]] = {}
    for one in assignments:
        kinds.setdefault((one.rule.algorithm, one.rule.why, str(list(one.shape))), []).append(one)
    lines = []
    for (algorithm, why, shape), members in kinds.items():
        cut = " + ".join(f"{n} of {r} x {c}" for n, r, c in members[0].matrices)
        lines.append(f"  {algorithm:6}{len(members):5} x {shape:22}{why:44}{cut}".rstrip())
    return "\n".join(lines)
