"""Low-rank adapters: their flags, what they can be put on, and what does not go with them.

LoRA (arXiv 2106.09685): ``y = W x + (alpha / rank) B A x`` with W frozen, A [rank, in] and B
[out, rank] trained, B zero at the start. A target is a group, one of Megatron's linear layers, or
a name of Hugging Face's modules as in PEFT's ``target_modules``. ``gate_proj`` and ``up_proj`` are
one layer here, ``linear_fc1``: they share A. Left out: dropout, biases, the router, embedding and
output layer, which stay frozen. The modules are in model/lora.py. No torch import.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

PARAMETERS = ("lora_A", "lora_B")
"""What an adapter's two parameters are called, beside the ``weight`` of their layer (PEFT)."""

_ATTENTION = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}
_FEED_FORWARDS = {"dense": "mlp", "shared": "mlp.shared_experts", "experts": "mlp.experts"}
_FC1, _FC2 = ("gate_proj", "up_proj"), "down_proj"


def _groups() -> dict[str, tuple[str, ...]]:
    """Return group -> names of linear layers below a transformer layer."""
    groups = {"attention": tuple(f"self_attention.{name}" for name in _ATTENTION)}
    for group, place in _FEED_FORWARDS.items():
        groups[group] = (f"{place}.linear_fc1", f"{place}.linear_fc2")
    return groups


GROUPS = _groups()
EVERYTHING = tuple(name for names in GROUPS.values() for name in names)
_ALL = ("all", "all-linear")


def expand_targets(targets: Iterable[str] | None) -> tuple[str, ...]:
    """Return the linear layers that targets stand for, by their names below a transformer layer.

    Args:
        targets: groups (attention, dense, shared, experts, all), Megatron's names, PEFT's names;
            None for all.

    Raises:
        ValueError: a name is unknown, or gate_proj comes without up_proj.
    """
    asked = list(_ALL[:1] if targets is None else targets)
    gate_and_up = [name for name in _FC1 if name in asked]
    if len(gate_and_up) == 1:
        raise ValueError(
            f"--k2-lora-targets {gate_and_up[0]}: gate_proj and up_proj are one layer with one "
            "lora_A; give both"
        )
    chosen = {name for target in asked for name in _layers_of(target)}
    if not chosen:
        raise ValueError("--k2-lora-targets names nothing; leave it out for all linear layers")
    return tuple(name for name in EVERYTHING if name in chosen)


def _layers_of(target: str) -> tuple[str, ...]:
    if target in _ALL:
        return EVERYTHING
    if target in GROUPS:
        return GROUPS[target]
    if target in EVERYTHING:
        return (target,)
    wanted = {peft: name for name, peft in _ATTENTION.items()} | {_FC2: "linear_fc2"}
    wanted |= dict.fromkeys(_FC1, "linear_fc1")
    leaf = wanted.get(target, target)
    found = tuple(name for name in EVERYTHING if name.rpartition(".")[2] == leaf)
    if not found:
        known = (*_ALL, *GROUPS, *_ATTENTION, "linear_fc1", "linear_fc2", *wanted)
        raise ValueError(f"--k2-lora-targets {target!r} is not one of {', '.join(known)}")
    return found


def layers_present(config: Any) -> frozenset[str]:
    """Return the linear layers that a model has, by their names below a transformer layer.

    Args:
        config: a transformer configuration, its ``moe_layer_freq`` a number or one entry a layer.
    """
    absent = {"linear_q_proj"}
    if config.q_lora_rank is None:
        absent = {"linear_q_down_proj", "linear_q_up_proj"}
    names = {name for name in GROUPS["attention"] if name.rpartition(".")[2] not in absent}
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(layer % pattern == 0) for layer in range(config.num_layers)]
    if config.num_moe_experts is None:
        pattern = [0]
    if 0 in pattern:
        names.update(GROUPS["dense"])
    if 1 in pattern:
        names.update(GROUPS["experts"])
        names.update(GROUPS["shared"] if config.moe_shared_expert_intermediate_size else ())
    return frozenset(names)


def describe_targets(targets: Iterable[str]) -> str:
    """Return what ``expand_targets`` gave, in a few words: whole groups by their names."""
    rest = list(targets)
    words = []
    for group, names in GROUPS.items():
        if set(names) <= set(rest):
            words.append(group)
            rest = [name for name in rest if name not in names]
    return ", ".join((*words, *rest))


def scale_of(rank: int, alpha: float | None) -> float:
    """Return the factor alpha / rank of an adapter's output; alpha is the rank where None."""
    return 1.0 if alpha is None else alpha / rank


def is_adapter(name: str) -> bool:
    """Tell by its name, or its key in a checkpoint, whether a parameter is an adapter's."""
    return name.rpartition(".")[2] in PARAMETERS


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--k2-lora-*``; destinations are fields of ``K2TransformerConfig``."""
    group = parser.add_argument_group(
        title="k2-lora",
        description="Low-rank adapters over a frozen base: only they have gradients and optimizer "
        "state. A base is read by --load DIR --finetune, or by --k2-load-hf.",
    )
    group.add_argument(
        "--k2-lora-rank",
        type=int,
        default=0,
        metavar="N",
        help="Rank of the adapters; 0 trains the model itself.",
    )
    group.add_argument(
        "--k2-lora-alpha",
        type=float,
        help="The adapters' output is multiplied by this over the rank; default: the rank.",
    )
    group.add_argument(
        "--k2-lora-targets",
        nargs="+",
        metavar="NAME",
        help=f"Linear layers with adapters: {', '.join(GROUPS)}, all (default); a layer's name "
        "here (linear_kv_up_proj, mlp.experts.linear_fc1), or PEFT's (kv_b_proj, down_proj).",
    )
    group.add_argument(
        "--k2-lora-load",
        metavar="DIR",
        help="Start from the adapters of this PEFT folder. Those of a checkpoint in --load win.",
    )


def check_adapters(settings: Any) -> None:
    """Refuse what adapters do not go with.

    Args:
        settings: Megatron's arguments or a transformer configuration; what it does not have is
            not checked.

    Raises:
        ValueError: with the flag to change.
    """
    rank, targets = settings.k2_lora_rank, expand_targets(settings.k2_lora_targets)
    alpha = settings.k2_lora_alpha
    if rank < 0 or (alpha is not None and alpha <= 0):
        raise ValueError(
            f"--k2-lora-rank {rank} must be at least 0 and --k2-lora-alpha {alpha} above 0"
        )
    if not rank:
        return
    found = {
        "--transformer-impl transformer_engine (its layers have no adapters yet; use local)":
            settings.transformer_impl != "local",
        "--delay-wgrad-compute (a frozen base has no weight gradients to delay)":
            _get(settings, "delay_wgrad_compute") or _get(settings, "k2_delay_wgrad_compute"),
        "--overlap-moe-expert-parallel-comm (never tried)":
            _get(settings, "overlap_moe_expert_parallel_comm"),
        "--moe-shared-expert-overlap, unless --k2-lora-targets leaves shared out":
            _get(settings, "moe_shared_expert_overlap")
            and any(name in targets for name in GROUPS["shared"]),
        "--mtp-num-layers (upstream builds those layers)": _get(settings, "mtp_num_layers"),
        "--use-megatron-fsdp": _get(settings, "use_megatron_fsdp"),
        "tied embeddings; give --untie-embeddings-and-output-weights":
            _get(settings, "untie_embeddings_and_output_weights", True) is False,
    }  # fmt: skip
    for what, is_asked in found.items():
        if is_asked:
            raise ValueError(f"--k2-lora-rank {rank} does not go with {what}")
    on_gpu = _get(settings, "k2_device") == "cuda"
    if on_gpu and rank % 8 and any(name in targets for name in GROUPS["experts"]):
        raise ValueError(
            f"--k2-lora-rank {rank} must be a multiple of 8 for experts on a GPU: its grouped "
            "product reads rows of 16 bytes"
        )


def _get(settings: Any, name: str, default: Any = None) -> Any:
    return getattr(settings, name, default)


def check_adapter_args(args: argparse.Namespace) -> None:
    """Check the flags and write out what they stand for; QK-Clip is turned off, see below.

    QK-Clip shrinks rows of ``linear_q_up_proj`` and ``linear_kv_up_proj``, which are frozen.

    Raises:
        ValueError: with the flag to change.
    """
    explicit: Sequence[str] = args.k2_explicit
    if not args.k2_lora_rank:
        for dest in ("k2_lora_alpha", "k2_lora_targets", "k2_lora_load"):
            if dest in explicit:
                flag = f"--{dest.replace('_', '-')}"
                raise ValueError(f"{flag} needs --k2-lora-rank, 16 say")
    check_adapters(args)
    if not args.k2_lora_rank:
        return
    args.k2_lora_targets = list(expand_targets(args.k2_lora_targets))
    args.k2_lora_alpha = float(args.k2_lora_alpha or args.k2_lora_rank)
    args.k2_lora_seed = args.seed
    if args.k2_qk_clip and "k2_qk_clip" in explicit:
        raise ValueError(
            "--k2-qk-clip shrinks weights that --k2-lora-rank freezes; leave one of the two out"
        )
    args.k2_qk_clip = False
