"""The engine's host kernels against plain torch in fp64, at even and odd shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_k2.engine import host_kernels
from megatron_k2.engine.core import LocalCore
from tests.unit.engine.small_models import LIMITS, build, largest_error, request_of, run

TOLERANCE = 2e-5  # fp32 sums of some hundred numbers of order 1


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert host_kernels.library() is not None, host_kernels.describe()


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MEGATRON_K2_HOST_KERNELS", "off")
    host_kernels.library.cache_clear()
    yield
    host_kernels.library.cache_clear()


def slow_experts(x: Tensor, chosen: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """Every expert on every row, in fp64."""
    gate, up = torch.einsum("rh,efh->ref", x.double(), fc1.double()).chunk(2, -1)
    each = torch.einsum("ref,ehf->reh", torch.nn.functional.silu(gate) * up, fc2.double())
    weights = torch.zeros(x.size(0), fc1.size(0), dtype=torch.float64)
    weights.scatter_(1, chosen, probs.double())
    return (each * weights[..., None]).sum(1)


@pytest.mark.parametrize(
    ("rows", "hidden", "ffn"), [(1, 16, 16), (7, 33, 20), (32, 64, 48), (300, 24, 40)]
)
def test_experts_equal_a_slow_twin_whole_and_cut_over_ranks(
    rows: int, hidden: int, ffn: int
) -> None:
    torch.manual_seed(rows)
    fc1, fc2 = torch.randn(6, 2 * ffn, hidden) / 4, torch.randn(6, hidden, ffn) / 4
    x, probs = torch.randn(rows, hidden), torch.rand(rows, 2)
    chosen = torch.rand(rows, 6).topk(2).indices

    def part(first: int, last: int) -> Tensor:
        panels = (
            host_kernels.packed_gated(fc1[first:last]), host_kernels.packed(fc2[first:last])
        )  # fmt: skip
        return host_kernels.experts(x, chosen, probs, first, *panels)

    expected = slow_experts(x, chosen, probs, fc1, fc2)
    scale = float(expected.abs().max())
    assert float((part(0, 6) - expected).abs().max()) <= TOLERANCE * scale
    assert float((part(0, 4) + part(4, 6) - expected).abs().max()) <= TOLERANCE * scale


def test_a_rows_experts_have_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    panels = (
        host_kernels.packed_gated(torch.randn(4, 64, 48)),
        host_kernels.packed(torch.randn(4, 48, 32)),
    )  # fmt: skip
    x, probs, chosen = torch.randn(40, 48), torch.rand(40, 2), torch.rand(40, 4).topk(2).indices
    whole = host_kernels.experts(x, chosen, probs, 0, *panels)
    for row in (0, 13, 39):
        one = slice(row, row + 1)
        alone = host_kernels.experts(x[one], chosen[one], probs[one], 0, *panels)
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize(("heads", "rank", "rope"), [(4, 64, 32), (5, 20, 6), (1, 8, 2)])
def test_attention_over_pages_equals_softmax(heads: int, rank: int, rope: int) -> None:
    torch.manual_seed(heads)
    ends = torch.tensor([1, 9, 40])
    query, pages = torch.randn(3, heads, rank + rope), torch.randn(200, rank + rope)
    places = torch.randint(200, (3, 40))
    found = host_kernels.attend(query, rank, pages, places, ends, 0.3)
    for one, end in enumerate(ends.tolist()):
        keys = pages[places[one, :end]].double()
        probs = torch.softmax(0.3 * query[one].double() @ keys.T, -1)
        torch.testing.assert_close(
            found[one].double(), probs @ keys[:, :rank], atol=TOLERANCE, rtol=0
        )


def test_softmax_survives_far_scores_and_activation_keeps_nan() -> None:
    pages = torch.tensor([[1000.0, 0.0], [-1000.0, 1.0]])
    found = host_kernels.attend(
        torch.ones(1, 1, 2), 2, pages, torch.tensor([[0, 1]]), torch.tensor([2]), 1.0
    )
    assert found.tolist() == [[[1000.0, 0.0]]]
    panels = (
        host_kernels.packed_gated(torch.ones(1, 2, 1)), host_kernels.packed(torch.ones(1, 1, 1))
    )  # fmt: skip
    x = torch.tensor([[float("nan")], [-500.0], [3.0]])
    out = host_kernels.experts(x, torch.zeros(3, 1).long(), torch.ones(3, 1), 0, *panels)
    assert out[0].isnan().all() and abs(float(out[1])) < 1e-30
    assert float(out[2]) == pytest.approx(float(torch.nn.functional.silu(x[2]) * 3), rel=1e-6)


@pytest.mark.usefixtures("single_process", "plain_torch")
def test_without_a_compiler_plain_torch_computes_the_same() -> None:
    model = build()
    core = LocalCore(model, LIMITS)
    assert "plain torch" in host_kernels.describe()
    assert core._weights.layers[0].attention.kv_norm is not None
    requests = [request_of(f"r{n}", n, top_log_probs=20) for n in (3, 33)]
    for answer in run(core, requests).values():
        assert largest_error(model, answer) <= 1e-5
