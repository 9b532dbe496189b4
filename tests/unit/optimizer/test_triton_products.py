"""The Triton kernel in Triton's interpreter, in its own process: the switch is read at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_k2.optimizer.coefficients import coefficient_schedule
from megatron_k2.optimizer.newton_schulz import newton_schulz
from megatron_k2.optimizer.symmetric_products import BACKENDS, load_backend

pytest.importorskip("triton", reason="torch's CPU builds come without Triton")

SCRIPT = """
import torch
from megatron_k2.optimizer.coefficients import coefficient_schedule
from megatron_k2.optimizer.newton_schulz import newton_schulz
from megatron_k2.optimizer.triton_products import symmetric_product

for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2 ** -7)):
    for n, k in ((1, 1), (5, 7), (64, 32), (100, 70)):
        x = torch.randn(2, n, k, dtype=dtype)
        wanted = x.double() @ x.double().transpose(1, 2)
        found = symmetric_product(x, x)
        assert torch.equal(found, found.transpose(1, 2))
        assert ((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())
momenta = torch.randn(2, 40, 70)
kimi = coefficient_schedule("kimi")
kernel = newton_schulz(momenta, kimi, torch.float32, "symmetric", "triton")
plain = newton_schulz(momenta, kimi, torch.float32, "standard")
assert (kernel - plain).abs().max() < 1e-4
print("same")
"""


def test_the_kernel_equals_the_plain_product() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_backends_are_chosen_by_name_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    momenta, kimi = torch.randn(1, 4, 6), coefficient_schedule("kimi")
    with pytest.raises(ValueError, match="--k2-muon-backend triton: matrices are on cpu"):
        newton_schulz(momenta, kimi, torch.float32, "symmetric", "triton")
    with pytest.raises(ValueError, match="'cutlass' is not one of torch, triton"):
        load_backend("cutlass")
    calls = []

    def mine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        calls.append(left.shape)
        return left @ right.transpose(1, 2)

    monkeypatch.setitem(BACKENDS, "mine", mine)
    newton_schulz(momenta, kimi, torch.float32, "symmetric", "mine")
    assert len(calls) == 10
