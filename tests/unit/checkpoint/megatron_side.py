"""Converted folders as torch itself reads them, and whole folders compared byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_k2.checkpoint import conversions, intact
from megatron_k2.checkpoint.conversions import Options
from tests.unit.checkpoint.hf_models import make_folder


def load_release(folder: Path) -> dict[str, Tensor]:
    """Return every global tensor of one iteration's folder, read by torch's own reader."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def load_shards(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a Hugging Face folder, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def there(source: Path, target: Path, **options: Any) -> Path:
    """Convert to Megatron in this process; return the release folder."""
    return conversions.to_megatron(source, target, Options(**options), workers=1, quiet=True)


def back(source: Path, target: Path, **options: Any) -> Path:
    """Convert to Hugging Face in this process; return the folder."""
    return conversions.to_hf(source, target, Options(**options), workers=1, quiet=True)


SMALL = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=40, n_routed_experts=4,
    num_hidden_layers=2, vocab_size=101, q_lora_rank=24, kv_lora_rank=16,
)  # fmt: skip
"""Changes to ``hf_models.BASE`` for tests that convert many times."""


def make_small(folder: Path, **changes: Any) -> Path:
    """Write a folder of about 100 kB."""
    return make_folder(folder, **SMALL | changes)


def assert_same_files(found: Path, expected: Path) -> None:
    """Every file of ``expected`` is in ``found``, byte for byte, and only the manifest beside."""
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} - {intact.MANIFEST} == names
    for name in sorted(names):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
