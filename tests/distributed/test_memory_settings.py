"""Recomputation, FP8 storage and FP8 products under layouts.

Recomputation changes no bit of a layout's run. Products in FP8 are the single process's where no
matrix is cut; under tensor parallelism a cut matrix has tiles of its own, and the curve is close.
All runs start from one checkpoint, with the routing of the first replayed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.matrix import UNEVEN_VPP2, Case, Curve, evidence_apart, layout_of, merge
from tests.distributed.pool import Pool

TRAIN = "tests.distributed.training_job:train"
RECOMPUTED = dict(
    recompute_granularity="selective",
    recompute_modules=["layernorm", "moe_act", "mla_up_proj", "moe_down_proj"],
)
BLOCKWISE = dict(fp8="e4m3", fp8_recipe="blockwise", k2_fp8_scope="linear")
PACKED = dict(k2_fp8_activations=["moe_up_proj_input", "swiglu_input"])
CASES = {
    "PP2": Case("", 2, layout_of(pp=2), bit_for_bit=True),
    "EP2 ZeRO-1": Case("", 2, layout_of(ep=2), True),
    "TP2 SP": Case("", 2, layout_of(tp=2), micro_batch_size=2),
    "PP2 x VPP2 uneven": Case("", 2, UNEVEN_VPP2, bit_for_bit=True),
    "TP2 x EP2, ETP2": Case("", 4, layout_of(tp=2, ep=2, etp=2), micro_batch_size=2),
    "TP2 x PP2 x EP2": Case("", 8, layout_of(tp=2, pp=2, ep=2, etp=1), micro_batch_size=2),
}
WIDE = {"EP2 ZeRO-1", "TP2 SP", "PP2 x VPP2 uneven", "TP2 x EP2, ETP2", "TP2 x PP2 x EP2"}


class Start:
    """The first run, in one process and in FP8, and the others from its start."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool = pool
        self.files = dict(checkpoint=str(folder / "start"), routing=str(folder / "routing.pt"))
        self.single = self.train(Case("", 1), BLOCKWISE, save_initial=True, record=True)

    def train(self, case: Case, fields: dict[str, Any], **options: Any) -> Curve:
        """Return the curve of a run with these configuration fields."""
        run = dict(
            layout=case.layout, num_steps=2, micro_batch_size=case.micro_batch_size,
            use_distributed_optimizer=case.use_distributed_optimizer, fields=fields,
            digest=not case.use_distributed_optimizer, **self.files, **options,
        )  # fmt: skip
        return merge(self.pool.run(TRAIN, case.world_size, kwargs=dict(run=run)))


@pytest.fixture(scope="module")
def start(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(pool, tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("name", evidence_apart(CASES, WIDE))
def test_recomputed_products_in_fp8_are_those_of_one_process(start: Start, name: str) -> None:
    case = CASES[name]
    found = start.train(case, BLOCKWISE | RECOMPUTED)
    if case.bit_for_bit:
        assert found.losses == start.single.losses
        assert found.weight_digests == start.single.weight_digests
    else:
        assert found == start.train(case, BLOCKWISE), "recomputation changed a bit"
    # A step of e4m3 is 1/16 of a number; a curve that went another way is off by tenths of itself.
    assert found.losses == pytest.approx(start.single.losses, rel=2e-3)
    assert found.losses[-1] < found.losses[0]


def test_storage_in_fp8_moves_the_backward_pass_only(start: Start) -> None:
    case = CASES["EP2 ZeRO-1"]
    plain, packed = start.train(case, {}), start.train(case, PACKED)
    assert packed.losses[0] == plain.losses[0] and packed.losses[1] != plain.losses[1]
    assert packed.losses == pytest.approx(plain.losses, rel=2e-3)
