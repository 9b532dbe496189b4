"""Context parallelism gives one process's losses and gradients, and moves latents only.

Single attention layers are compared number by number. Whole trainings start from one checkpoint;
compared are losses, gradient norms and, from the checkpoints after the next step, the first moment
of every weight, which is the gradient (of AdamW a tenth) beside what both runs loaded; of MuonClip
also the weights, clipped heads among them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.matrix import evidence_apart
from tests.distributed.pool import Pool
from tests.distributed.test_attention_parallel import fields, largest_difference
from tests.distributed.trainings import Training, tensors_of, zygote

STEP = "tests.distributed.context_job:context_step"
BYTES = "tests.distributed.context_job:context_bytes"
DOCUMENTS = [0, 7, 8, 30, 48]
RECOMPUTED = dict(recompute_granularity="selective", recompute_modules=["core_attn", "mla_up_proj"])
SUM_ORDER = 1e-5  # fp32 sums in another order, relative to the largest number of a tensor


def step(pool: Pool, tp: int, cp: int, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    layout = dict(tensor_model_parallel_size=tp, context_parallel_size=cp)
    return pool.run(STEP, tp * cp, layout=layout, kwargs=kwargs)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("output", "grad_hidden", "max_logits"):
        assert largest_difference(found[name], expected[name]) < SUM_ORDER, name
    for name, gradient in expected["gradients"].items():
        assert largest_difference(found["gradients"][name], gradient) < SUM_ORDER, name


ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal mask": dict(mask="causal"),
    "mask of documents": dict(mask="documents"),
    "packed documents": dict(bounds=DOCUMENTS),
}
LAYERS = {
    "query latent": {},
    "no query latent": dict(q_lora_rank=None),
    "rope": dict(rope_type="rope"),
}


@pytest.mark.parametrize("rows", evidence_apart(ROWS, {"causal mask"}))
def test_layer_over_context_ranks_equals_one_process(pool: Pool, rows: str) -> None:
    (single,) = step(pool, 1, 1, dict(fields=fields(), **ROWS[rows]))
    for size in (2, 4):
        ranks = step(pool, 1, size, dict(fields=fields(), state=single["state"], **ROWS[rows]))
        for rank in ranks:
            assert_same(rank, single)


@pytest.mark.parametrize(
    ("sequence_parallel", "rows"),
    [
        (False, "plain"),
        (True, "packed documents"),
        pytest.param(False, "packed documents", marks=pytest.mark.evidence),
        pytest.param(True, "plain", marks=pytest.mark.evidence),
    ],
)
def test_layer_over_context_and_tensor_ranks_equals_one_process(
    pool: Pool, sequence_parallel: bool, rows: str
) -> None:
    (single,) = step(pool, 1, 1, dict(fields=fields(), **ROWS[rows]))
    both = fields(sequence_parallel=sequence_parallel)
    for rank in step(pool, 2, 2, dict(fields=both, state=single["state"], **ROWS[rows])):
        assert_same(rank, single)


@pytest.mark.parametrize("layer", ["no query latent", "rope"])
def test_other_layers_over_context_ranks_equal_one_process(pool: Pool, layer: str) -> None:
    (single,) = step(pool, 1, 1, dict(fields=fields(**LAYERS[layer])))
    kwargs = dict(fields=fields(**LAYERS[layer]), state=single["state"])
    assert_same(step(pool, 1, 2, kwargs)[0], single)


@pytest.mark.parametrize("rows", evidence_apart(["plain", "packed documents"], {"plain"}))
def test_recomputation_changes_no_bit_and_gathers_once(pool: Pool, rows: str) -> None:
    plain, recomputed = (
        step(pool, 1, 2, dict(fields=fields(**changes), **ROWS[rows]))[0]
        for changes in ({}, RECOMPUTED)
    )
    for name in ("output", "grad_hidden", "max_logits"):
        assert np.array_equal(plain[name], recomputed[name]), name
    for name, gradient in plain["gradients"].items():
        assert np.array_equal(gradient, recomputed["gradients"][name]), name
    assert plain["given"] == recomputed["given"]


# (preset, tensor, context, tokens of a row) -> numbers a token that are gathered and that core
# attention sees on this rank: latent and rotary key; heads x (nope + rope + value).
WIDTHS = {
    ("k2-nano", 1, 2, 512): (64 + 32, 4 * (64 + 32 + 64)),
    ("kimi-k2", 1, 8, 256): (512 + 64, 64 * (128 + 64 + 128)),
    ("kimi-k2", 8, 8, 256): ((512 + 64) // 8, 8 * (128 + 64 + 128)),
}


@pytest.mark.evidence  # leaves the pool's world for a fake one: a worker aborted once
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.evidence] if case[1] > 1 else []) for case in WIDTHS],
)
def test_bytes_are_those_of_latents_not_of_keys_and_values(pool: Pool, case: Any) -> None:
    preset, tp, cp, tokens = case
    sizes = dict(tensor_model_parallel_size=tp, context_parallel_size=cp)
    what = dict(preset=preset, world_size=tp * cp, tokens=tokens, sizes=sizes)
    (found,) = pool.run(BYTES, 1, kwargs=what)
    gathered, expanded = (2 * width * tokens // cp for width in WIDTHS[case])  # bf16
    print(
        f"{case}: {gathered} bytes a rank, keys and values {expanded}: {expanded / gathered:.2f}x"
    )
    assert found["expanded"] == [expanded]
    assert found["given"] == {"_allgather_base_": gathered, "_reduce_scatter_base_": gathered * cp}


TRAINED = {
    "CP2": (2, ("--context-parallel-size=2",)),
    "CP4": (4, ("--context-parallel-size=4",)),
    "DP2 x CP2": (4, ("--context-parallel-size=2",)),
    "EP2 over CP2": (2, ("--context-parallel-size=2", "--expert-model-parallel-size=2")),
    "TP2 x CP2": (
        4,
        ("--context-parallel-size=2", "--tensor-model-parallel-size=2", "--sequence-parallel"),
    ),
    "PP2 x CP2": (4, ("--context-parallel-size=2", "--pipeline-model-parallel-size=2")),
    "EP2 x PP2 x CP2": (
        8,
        (
            *("--context-parallel-size=2", "--pipeline-model-parallel-size=2"),
            "--expert-model-parallel-size=2",
        ),
    ),
}
PACKED = "--dataloader-inter-document-masking"
RUNS = {
    "plain": (),
    "masked ends": ("--eod-mask-loss",),
    "packed": (PACKED,),
    "muonclip": (
        *(PACKED, "--optimizer=muonclip", "--k2-max-attention-logit"),
        "--k2-muon-dtype=fp32",  # a bound for sums needs updates that are not rounded to bf16
        "--qk-clip-threshold=0.05",  # some heads of a fresh k2-micro lie above it
    ),
}
ALWAYS = [("muonclip", "CP2")]
CASES = [
    *ALWAYS,
    ("masked ends", "EP2 over CP2"),
    *(("plain", layout) for layout in TRAINED),
    *(("packed", layout) for layout in ("CP2", "CP4", "TP2 x CP2", "PP2 x CP2")),
    *(("masked ends", layout) for layout in ("CP4", "TP2 x CP2")),
    *(("muonclip", layout) for layout in ("CP4", "TP2 x CP2", "EP2 x PP2 x CP2")),
]
# All that Kimi K2's preset recomputes and offloads, and core attention.
MEMORY = (
    *("--recompute-granularity=selective", "--recompute-modules", "layernorm", "moe_act"),
    *("mla_up_proj", "moe_down_proj", "--fine-grained-activation-offloading"),
    *("--offload-modules", "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"),
)


def corpus(folder: Path) -> tuple[str, ...]:
    """Write documents of 3 to 39 tokens; return the arguments that name them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{folder}/short.bin", dtype=np.int32)
    generator = torch.Generator().manual_seed(0)
    for length in torch.randint(3, 40, (400,), generator=generator).tolist():
        tokens = torch.randint(1023, (length,), generator=generator, dtype=torch.int32)
        tokens[-1] = 1023  # the end of a document, NullTokenizer's own
        builder.add_document(tokens, [length])
    builder.finalize(f"{folder}/short.idx")
    return (f"--data-path={folder}/short", "--split=100,0,0", "--vocab-size=1024")


class Start:
    """A corpus, and for each kind of run two steps of one process with checkpoints of both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, corpus(folder)
        self.singles: dict[str, Training] = {}

    def train(self, kind: str, world_size: int, *arguments: str) -> Training:
        training = zygote().train(
            *self.data, "--train-iters=2", "--adam-eps=1e-5", "--save-interval=1",
            *RUNS[kind], *arguments, world_size=world_size,
        )  # fmt: skip
        assert training.wait() == [0] * world_size, training.output()
        return training

    def place(self, kind: str) -> Path:
        return self.folder / kind.replace(" ", "-")

    def single(self, kind: str) -> Training:
        """Return the one process's run, the first time it is asked for by running it."""
        if kind not in self.singles:
            self.singles[kind] = self.train(kind, 1, f"--save={self.place(kind)}")
        return self.singles[kind]

    def compare(self, kind: str, layout: str) -> None:
        """Take the second step in another layout; losses, norms and gradients must be equal."""
        single, place = self.single(kind), self.place(kind)
        world_size, arguments = TRAINED[layout]
        saved = place.with_name(f"{place.name}-{layout.replace(' ', '-')}")
        found = self.train(
            kind, world_size, *arguments, f"--load={place}", "--ckpt-step=1", f"--save={saved}"
        )
        losses, wanted = (
            [float.fromhex(value) for value in run.losses()[2].split()] for run in (found, single)
        )
        assert losses == pytest.approx(wanted, rel=SUM_ORDER)
        ours, theirs = (tensors_of(folder / "iter_0000002") for folder in (saved, place))
        kinds = "exp_avg|momentum_buffer|param" if kind == "muonclip" else "exp_avg"
        compared = [name for name in theirs if re.match(rf"optimizer\.state\.({kinds})\.", name)]
        assert len(compared) > 30
        for name in compared:
            largest = theirs[name].abs().max()
            assert (ours[name] - theirs[name]).abs().max() <= 4 * SUM_ORDER * largest, name
        if kind == "muonclip":
            assert clipped_share(found) > 0, "no head was clipped in this step"


def clipped_share(run: Training) -> float:
    """Return the share of heads that the first step of a resumed run clipped."""
    (share,) = re.findall(r"iteration +2/.*heads clipped: ([^ ]+)", run.output())[:1]
    return float(share)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.evidence]) for case in CASES],
)
def test_training_over_context_ranks_is_that_of_one_process(
    start: Start, kind: str, layout: str
) -> None:
    start.compare(kind, layout)


@pytest.mark.evidence
def test_recomputation_and_offloading_change_no_bit_over_context_ranks(start: Start) -> None:
    plain, other = (
        start.train("plain", 2, *TRAINED["EP2 over CP2"][1], *memory) for memory in ((), MEMORY)
    )
    assert len(plain.losses()) == 2
    assert other.losses() == plain.losses()
