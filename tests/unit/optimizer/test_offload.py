"""State on the host between steps: bytes freed, bytes moved, bits kept."""

from __future__ import annotations

import pytest
import torch

from megatron_k2.optimizer.matrices import Rule
from megatron_k2.optimizer.muonclip import MuonClip
from megatron_k2.optimizer.offload import HostOffload


def test_memory_is_free_on_the_host_side_and_bits_come_back() -> None:
    tensors = {"a": [torch.randn(10), torch.randn(3, 4)], "b": [torch.randn(5).bfloat16()]}
    kept = {key: [one.clone() for one in some] for key, some in tensors.items()}
    store = HostOffload(tensors)
    assert store.offloaded_bytes == 22 * 4 + 5 * 2 and store.resident_bytes == 0
    assert all(t.untyped_storage().nbytes() == 0 for some in tensors.values() for t in some)
    store.fetch(["a", "unknown"])
    assert store.resident_bytes == 88 and store.moved_bytes == 88
    assert all(torch.equal(x, y) for x, y in zip(tensors["a"], kept["a"], strict=True))
    tensors["a"][0].add_(1)
    store.release(["a", "b"])
    assert store.resident_bytes == 0 and store.moved_bytes == 2 * 88
    assert torch.equal(store.current("a")[0], kept["a"][0] + 1)
    store.fetch(store.tensors)
    assert torch.equal(tensors["a"][0], kept["a"][0] + 1)
    assert store.current("b")[0] is tensors["b"][0]


def test_views_of_larger_storages_are_refused() -> None:
    with pytest.raises(ValueError, match="shares its storage"):
        HostOffload({"a": [torch.randn(10)[:5]]})


def test_only_what_is_in_use_is_resident_during_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight parameters; the momenta of two at a time are on the device, one ahead."""
    weights = {f"w{i}": torch.randn(4, 6).requires_grad_() for i in range(8)}
    optimizer = MuonClip.for_model(weights.items(), [Rule("w*", "muon")], max_batch_bytes=4 * 24)
    assert optimizer.exchange is not None
    optimizer.attach(optimizer.exchange, list(weights.values()), offload="moments")
    seen = []
    rule = optimizer.rule

    class Watching:
        scale, flops = rule.scale, rule.flops

        def __call__(self, momenta: torch.Tensor) -> torch.Tensor:
            seen.append(optimizer.moments.resident_bytes)
            return rule(momenta)

    optimizer.rule = Watching()  # type: ignore[assignment]
    for weight in weights.values():
        weight.grad = torch.randn(4, 6)
    optimizer.step()
    assert len(seen) == 8 and max(seen) == 2 * 96
    assert optimizer.moments.resident_bytes == 0
    assert optimizer.moments.moved_bytes == 2 * 8 * 96
