"""Every parallel layout trains like one process: fp32, ten steps, one checkpoint, same routing."""

from pathlib import Path

import pytest

from tests.distributed.matrix import (
    CASES,
    SPREADS_ALLOWED,
    Case,
    Curve,
    largest_difference,
    largest_range,
    merge,
    microbatch_orders,
)
from tests.distributed.pool import Job, Pool

TRAIN = "tests.distributed.training_job:train"


class Reference:
    """The single-process run, its checkpoint and routing, and the spread of reordered runs."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool = pool
        self.files = dict(checkpoint=str(folder / "start"), routing=str(folder / "routing.pt"))
        first = self.start(Case("reference", 1), save_initial=True, record=True)
        self.curve = merge(first.result())
        self.by_size = {1: self.curve}
        reordered = self._two_at_a_time(microbatch_orders())
        curves = [self.curve, *reordered]
        self.loss_spread = largest_range([curve.losses for curve in curves])
        self.norm_spread = largest_range([curve.grad_norms for curve in curves])

    def for_size(self, micro_batch_size: int) -> Curve:
        """Return the single-process run with this micro batch size (the shapes of its products)."""
        if micro_batch_size not in self.by_size:
            single = Case("single process", 1, micro_batch_size=micro_batch_size)
            self.by_size[micro_batch_size] = merge(self.start(single).result())
        return self.by_size[micro_batch_size]

    def _two_at_a_time(self, orders: list[tuple[int, ...]]) -> list[Curve]:
        """Run the orders in pairs: one process for each of the two cores `make test` has."""
        curves: list[Curve] = []
        for first in range(0, len(orders), 2):
            jobs = [
                self.start(Case("reordered", 1), order=order) for order in orders[first : first + 2]
            ]
            curves += [merge(job.result()) for job in jobs]
        return curves

    def start(self, case: Case, **options: object) -> Job:
        """Start a run from the shared checkpoint (from scratch with ``save_initial``)."""
        run = dict(
            layout=case.layout,
            use_distributed_optimizer=case.use_distributed_optimizer,
            micro_batch_size=case.micro_batch_size,
            digest=not case.use_distributed_optimizer,
            **self.files,
            **options,
        )
        return self.pool.submit(TRAIN, case.world_size, kwargs=dict(run=run))


@pytest.fixture(scope="module")
def reference(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(pool, tmp_path_factory.mktemp("layouts"))


def test_reference_learns_and_the_spread_is_rounding(reference: Reference):
    curve = reference.curve
    assert curve.losses[-1] < curve.losses[0] - 0.3
    assert 0 < reference.loss_spread < 1e-3
    assert 0 < reference.norm_spread < 1e-2


def test_replayed_routing_reproduces_the_recorded_run_bit_for_bit(reference: Reference):
    again = merge(reference.start(Case("again", 1)).result())
    assert again == reference.curve


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.evidence] if case.evidence else [])
        for case in CASES
    ],
)
def test_layout_trains_like_one_process(reference: Reference, case: Case, record_property):
    curve = merge(reference.start(case).result())
    wanted = reference.for_size(case.micro_batch_size)
    loss = largest_difference(curve.losses, wanted.losses)
    norm = largest_difference(curve.grad_norms, wanted.grad_norms)
    record_property("loss_over_spread", loss / reference.loss_spread)
    record_property("norm_over_spread", norm / reference.norm_spread)
    print(
        f"{case.name}: loss {loss:.2e} = {loss / reference.loss_spread:.2f} spreads, "
        f"gradient norm {norm:.2e} = {norm / reference.norm_spread:.2f} spreads"
    )
    if case.bit_for_bit:
        assert curve.losses == wanted.losses
        assert curve.grad_norms_by_name == wanted.grad_norms_by_name
        assert curve.gradient_digests == wanted.gradient_digests
        assert curve.weight_digests == wanted.weight_digests
    assert loss <= SPREADS_ALLOWED * reference.loss_spread
    assert norm <= SPREADS_ALLOWED * reference.norm_spread
