"""A trainer over several ranks that writes a version of its weights, and an engine of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_k2.rl.sync.disk import DiskSync, write_version
from megatron_k2.rl.sync.disk_writer import DiskWriter
from megatron_k2.rl.sync.fingerprint import SyncRefused
from megatron_k2.rl.sync.live import LiveWeights
from tests.unit.engine.small_models import randomise_
from tests.unit.model.tiny import build_model, tiny_config
from tests.unit.rl.sync_setting import Setting, answer, config_of, difference, with_setting

FIELDS = dict(num_moe_experts=6, q_lora_rank=28, kv_lora_rank=24)  # what two ranks can share
NUM_IDS = 96  # likewise: ids that pad a vocabulary count in a softmax


def write(folder: str, version: int, **layout: int) -> str:
    """Write a version from this layout's ranks; return the fingerprint."""
    torch.set_num_threads(1)
    config = tiny_config(**FIELDS, **layout, moe_token_dispatcher_type="alltoall")
    model = randomise_(build_model(config, NUM_IDS), torch.distributed.get_rank())
    _share_what_is_whole(model)
    hugging_face, shape = config_of(vocab_size=NUM_IDS, **FIELDS)
    weights = LiveWeights([model], shape, "F32", torch.distributed.group.WORLD)
    return write_version(DiskWriter(Path(folder), weights, hugging_face), version).to_json()


def _share_what_is_whole(model: torch.nn.Module) -> None:
    """Make parameters that every rank holds whole the first rank's, as training keeps them."""
    from megatron_k2 import parallel

    tensors = dict(model.named_parameters()) | {
        name: one for name, one in model.named_buffers() if name.endswith("expert_bias")
    }
    experts_are_cut = parallel.get_pg_collection().ep.size() > 1
    for name, tensor in tensors.items():
        is_cut = getattr(tensor, "tensor_model_parallel", False)
        if not is_cut and not (experts_are_cut and ".experts." in name and "shared" not in name):
            torch.distributed.broadcast(tensor.data, src=0)


def read(folder: str, version: int) -> dict[str, Any]:
    """Bring a version into an engine of this process; return what came of it."""
    found: dict[str, Any] = {}
    model = randomise_(build_model(tiny_config(**FIELDS), NUM_IDS), 9)

    async def use(setting: Setting) -> None:
        sync = DiskSync(Path(folder), setting.receiver, setting.gate, "F32")
        found["fingerprint"] = (await sync.push(version)).to_json()
        found["error"] = difference(model, await answer(setting.gate))
        weights = next(Path(folder).glob("*/*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        try:
            again = DiskSync(Path(folder), setting.receiver, setting.gate, "F32")
            await again.push(version)
        except SyncRefused as error:
            found["refused"] = str(error)

    with_setting(model, use, shape=config_of(vocab_size=NUM_IDS, **FIELDS)[1])
    return found
