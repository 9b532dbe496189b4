"""Is a parallel layout possible? Answered before any process group or model exists.

``validate_layout`` names the wrong value, what is allowed and the flag to change, where upstream
asserts (megatron-core 0.19.2, ``training/arguments.py`` and ``transformer_config.py``) or fails
later. ``propose_pipeline_layout`` writes uneven pipeline splits in the grammar of
``--pipeline-model-parallel-layout``. Pure Python: imports neither torch nor Megatron.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Layout:
    """What decides whether a parallel layout is possible; fields are Megatron's argument names.

    ``None`` means "not given"; a check that needs a missing value is skipped.
    """

    world_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    pipeline_model_parallel_layout: str | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    sequence_parallel: bool = False
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    seq_length: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    overlap_moe_expert_parallel_comm: bool = False
    delay_wgrad_compute: bool = False
    bf16: bool = False
    fp16: bool = False

    @classmethod
    def from_args(cls, args: Any) -> Layout:
        """Read the fields from an argparse namespace (or any object); absent ones keep defaults."""
        given = {field.name: getattr(args, field.name, None) for field in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})


def validate_layout(layout: Layout | Any) -> None:
    """Check a layout before anything is built.

    ``layout`` is a Layout or any object with Megatron's argument names.

    Raises:
        ValueError: the first thing that cannot work: the value, what is allowed, the flag.
    """
    layout = layout if isinstance(layout, Layout) else Layout.from_args(layout)
    _check_sizes(layout)
    _check_divisions(layout)
    _check_processes(layout)
    _check_batch(layout)
    _check_pipeline(layout)
    _check_overlap(layout)


_SIZE_FIELDS = tuple(field.name for field in fields(Layout) if field.name.endswith("parallel_size"))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_sizes(layout: Layout) -> None:
    for name in _SIZE_FIELDS:
        value = getattr(layout, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} {value} must be at least 1")


def _check_processes(layout: Layout) -> None:
    expert_tp = layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size
    dense = {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
    }
    expert = {
        "expert_tensor_parallel_size": expert_tp,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
    }
    for sizes in (dense, expert):
        needed = 1
        for size in sizes.values():
            needed *= size
        if layout.world_size % needed:
            named = " x ".join(f"{_flag(n)} {s}" for n, s in sizes.items() if s > 1)
            raise ValueError(
                f"{named} needs a multiple of {needed} processes; "
                f"torchrun started {layout.world_size}"
            )


def _check_divisions(layout: Layout) -> None:
    expert_tp = layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size
    _must_divide(
        "tensor_model_parallel_size",
        layout.tensor_model_parallel_size,
        layout,
        "num_attention_heads",
    )
    _must_divide(
        "expert_model_parallel_size", layout.expert_model_parallel_size, layout, "num_experts"
    )
    if layout.num_experts:
        _must_divide("expert_tensor_parallel_size", expert_tp, layout, "moe_ffn_hidden_size")
    elif layout.expert_model_parallel_size > 1:
        raise ValueError(
            f"--expert-model-parallel-size {layout.expert_model_parallel_size} needs "
            "--num-experts; none given"
        )
    _check_context(layout)
    if layout.sequence_parallel:
        _must_divide(
            "tensor_model_parallel_size", layout.tensor_model_parallel_size, layout, "seq_length"
        )
    elif layout.num_experts and layout.tensor_model_parallel_size > 1:
        raise ValueError(
            f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} with --num-experts "
            f"{layout.num_experts} needs --sequence-parallel"
        )


def _check_context(layout: Layout) -> None:
    """Check that a sequence divides into two chunks a context-parallel rank, and those over TP."""
    size, tokens = layout.context_parallel_size, layout.seq_length
    if size == 1 or tokens is None:
        return
    flag = f"--context-parallel-size {size}"
    if tokens % (2 * size):
        raise ValueError(
            f"--seq-length {tokens} must be a multiple of {2 * size}: {flag} cuts it into "
            f"{2 * size} chunks, two a rank"
        )
    tensor = layout.tensor_model_parallel_size
    if layout.sequence_parallel and tokens // size % tensor:
        raise ValueError(
            f"--seq-length {tokens} must be a multiple of {size * tensor}: {flag} leaves "
            f"{tokens // size} tokens, which --tensor-model-parallel-size {tensor} shares"
        )


def _must_divide(flag: str, value: int, layout: Layout, of: str) -> None:
    total = getattr(layout, of)
    if total is not None and total % value:
        allowed = [d for d in range(1, min(total, 1024) + 1) if total % d == 0]
        raise ValueError(
            f"{_flag(flag)} {value} must divide {of} {total} (allowed: {_shortened(allowed)})"
        )


def _shortened(allowed: list[int], most: int = 12) -> str:
    return ", ".join(map(str, allowed[:most])) + (", ..." if len(allowed) > most else "")


def _check_batch(layout: Layout) -> None:
    if layout.micro_batch_size is None or layout.global_batch_size is None:
        return
    data_parallel = layout.world_size // (
        layout.tensor_model_parallel_size
        * layout.pipeline_model_parallel_size
        * layout.context_parallel_size
    )
    per_step = layout.micro_batch_size * data_parallel
    if layout.global_batch_size % per_step:
        raise ValueError(
            f"--global-batch-size {layout.global_batch_size} must be a multiple of "
            f"--micro-batch-size {layout.micro_batch_size} x data parallel size "
            f"{data_parallel} = {per_step}"
        )


def _check_pipeline(layout: Layout) -> None:
    stages = layout.pipeline_model_parallel_size
    if layout.num_layers is None:
        return
    if layout.pipeline_model_parallel_layout is not None:
        _check_layout_string(layout.pipeline_model_parallel_layout, layout.num_layers, stages)
        return
    uneven = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    if stages == 1 or uneven != (None, None):
        return
    if layout.num_layers < stages:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} is more than num_layers {layout.num_layers}"
        )
    virtual = layout.num_virtual_stages_per_pipeline_rank or 1
    if layout.num_layers % (stages * virtual):
        proposal = propose_pipeline_layout(layout.num_layers, stages, virtual)
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} x {virtual} virtual stages must divide "
            f"num_layers {layout.num_layers}; for an uneven split pass "
            f"--pipeline-model-parallel-layout '{proposal}'"
        )


def _check_layout_string(text: str, num_layers: int, num_stages: int) -> None:
    stages = parse_pipeline_layout(text)
    if len(stages) % num_stages:
        raise ValueError(
            f"--pipeline-model-parallel-layout '{text}' has {len(stages)} stages; must be a "
            f"multiple of --pipeline-model-parallel-size {num_stages}"
        )
    found = sum(stage.count("t") for stage in stages)
    if found != num_layers:
        raise ValueError(
            f"--pipeline-model-parallel-layout '{text}' holds {found} layers; "
            f"num_layers is {num_layers}"
        )


def _check_overlap(layout: Layout) -> None:
    if layout.delay_wgrad_compute and not layout.overlap_moe_expert_parallel_comm:
        raise ValueError("--delay-wgrad-compute needs --overlap-moe-expert-parallel-comm")
    if not layout.overlap_moe_expert_parallel_comm:
        return
    flag = "--overlap-moe-expert-parallel-comm"
    if not (layout.bf16 or layout.fp16):
        raise ValueError(f"{flag} runs in --bf16 or --fp16 only; the run is fp32")
    if layout.expert_model_parallel_size == 1:
        raise ValueError(f"{flag} needs --expert-model-parallel-size of 2 or more; it is 1")
    if layout.pipeline_model_parallel_size > 1 and _virtual_stages(layout) == 1:
        raise ValueError(
            f"{flag} with --pipeline-model-parallel-size {layout.pipeline_model_parallel_size} "
            "needs interleaved stages: --num-virtual-stages-per-pipeline-rank of 2 or more"
        )


def _virtual_stages(layout: Layout) -> int:
    if layout.pipeline_model_parallel_layout is not None:
        stages = parse_pipeline_layout(layout.pipeline_model_parallel_layout)
        return len(stages) // layout.pipeline_model_parallel_size
    if layout.num_layers_per_virtual_pipeline_stage and layout.num_layers:
        per_rank = layout.num_layers // layout.pipeline_model_parallel_size
        return max(1, per_rank // layout.num_layers_per_virtual_pipeline_stage)
    return layout.num_virtual_stages_per_pipeline_rank or 1


def parse_pipeline_layout(text: str) -> list[str]:
    """Split a ``--pipeline-model-parallel-layout`` string into stages of E, t, m, L characters.

    Upstream's grammar: ``|`` ends a stage, ``(tt|)*3`` and ``t*3`` repeat, commas are ignored.

    Raises:
        ValueError: a character outside the grammar, or not exactly one E first and one L last.
    """
    flat = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        flat = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), flat)
    if strange := sorted(set(flat) - set("EtmL|")):
        raise ValueError(
            f"--pipeline-model-parallel-layout '{text}' holds {''.join(strange)!r}; allowed are "
            "E (embedding), t (layer), m (MTP), L (loss), | and repetitions (..)*n"
        )
    order = flat.replace("|", "")
    if order[:1] != "E" or order[-1:] != "L" or order.count("E") != 1 or order.count("L") != 1:
        raise ValueError(
            f"--pipeline-model-parallel-layout '{text}' must hold one E, first, and one L, last"
        )
    return flat.split("|")


def propose_pipeline_layout(
    num_layers: int,
    num_stages: int,
    num_virtual_stages: int = 1,
    embedding_cost: float = 1.0,
    loss_cost: float = 2.0,
) -> str:
    """Propose a layout string that balances ``num_stages x num_virtual_stages`` pipeline stages.

    Costs are in units of one layer. The default loss cost is K2's: the output matrix (7,168 x
    163,840) has 2.4 times the active weights of a MoE layer (101 M attention + 9 x 44 M experts).
    Ties go to later stages, because early ones hold more microbatches in flight (1F1B).
    Example: 61 layers on 16 stages -> ``Ettt|(tttt|)*14ttL``.

    Raises:
        ValueError: fewer layers than stages leave a stage without a layer.
    """
    total = num_stages * num_virtual_stages
    if num_layers < total:
        raise ValueError(
            f"--pipeline-model-parallel-size {num_stages} x {num_virtual_stages} virtual stages "
            f"is more than num_layers {num_layers}"
        )
    if total == 1:
        return "E" + "t" * num_layers + "L"
    counts = [1] * total
    fixed = [embedding_cost] + [0.0] * (total - 2) + [loss_cost]
    for _ in range(num_layers - total):
        load = [count + extra for count, extra in zip(counts, fixed, strict=True)]
        counts[total - 1 - load[::-1].index(min(load))] += 1
    stages = ["t" * count for count in counts]
    stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
    return _folded(stages)


def _folded(stages: list[str]) -> str:
    """Write stages as a layout string, runs of equal stages as ``(tt|)*n``."""
    text, position = "", 0
    while position < len(stages) - 1:
        run = 1
        while position + run < len(stages) - 1 and stages[position + run] == stages[position]:
            run += 1
        stage = stages[position] + "|"
        text += f"({stage})*{run}" if run > 1 else stage
        position += run
    return text + stages[-1]
