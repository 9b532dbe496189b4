"""vLLM's own weight transfer by NCCL, without a file between trainer and engine. Not run.

By vLLM's public example examples/rl/rlhf_http_nccl.py: rank 0 of the trainer and the server's ranks
form a communicator; each round is start, update with a broadcast under way, finish. The server runs
with VLLM_SERVER_DEV_MODE=1 and ``--weight-transfer-config '{"backend": "nccl"}'``. Later releases
(0.29 documents ``WeightTransferTrainerFactory``) drive it another way: they are refused by the
missing name. The server shows no weights: log-probabilities are compared.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import torch

from megatron_k2.compat import optional
from megatron_k2.rl.sync.base import Push
from megatron_k2.rl.sync.fingerprint import TOLERANCE_NATS, Fingerprint
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.live import LiveWeights
from megatron_k2.rl.sync.probe import trainer_top
from megatron_k2.rl.sync.servers import ServerReceiver
from megatron_k2.rl.sync.whole import whole_tensors

_MODULE = "vllm.distributed.weight_transfer.nccl_engine"


class VLLMNativeSync(Push):
    """``WeightSync`` by NCCL into a vLLM server, from a trainer of one rank.

    Args:
        trainer: on a GPU of its own.
        receiver: of the server, for the control calls and the probe.
        gate: what rollouts sample from.
        master: address and free port of this machine.

    Raises:
        ImportError: vLLM is missing, or its API is another; with the line that installs it.
    """

    def __init__(
        self,
        trainer: LiveWeights,
        receiver: ServerReceiver,
        gate: GatedEngine,
        master: tuple[str, int],
    ) -> None:
        super().__init__(receiver, gate, TOLERANCE_NATS[trainer.dtype])
        optional("vllm").require()
        self._transfer = importlib.import_module(_MODULE)
        self._trainer, self._server, self._master = trainer, receiver, master
        self._group: Any = None

    async def _publish(self, version: int) -> Fingerprint:
        sums = await asyncio.to_thread(self._trainer.sums)
        vocab_size = self._trainer.shape.vocab_size
        top = await asyncio.to_thread(trainer_top, self._trainer.chunks[0], vocab_size)
        return Fingerprint(version, sums, top)

    async def _bring(self, version: int) -> None:
        post = self._server.post
        if self._group is None:
            await self._connect()
        await post("/pause", {})
        try:
            await post("/start_weight_update", {"is_checkpoint_format": True})
            told = post("/update_weights", {"update_info": self._names()})
            await asyncio.gather(told, asyncio.to_thread(self._send))
            await post("/finish_weight_update", {})
        finally:
            await post("/resume", {})
        self._server.engine.weight_version = version

    async def _connect(self) -> None:
        """Join the server's ranks in one communicator; the trainer is rank 0."""
        address, port = self._master
        count = (await self._server.get("/get_world_size"))["world_size"] + 1
        place = {"master_address": address, "master_port": port, "world_size": count}
        told = self._server.post(
            "/init_weight_transfer_engine", {"init_info": place | {"rank_offset": 1}}
        )
        joined = asyncio.to_thread(self._transfer.NCCLWeightTransferEngine.trainer_init, place)
        _, self._group = await asyncio.gather(told, joined)

    def _names(self) -> dict[str, Any]:
        sums = self._trainer.sums()
        words = {"BF16": "bfloat16", "F32": "float32"}
        return {
            "names": list(sums),
            "dtype_names": [words[one.dtype] for one in sums.values()],
            "shapes": [list(one.shape) for one in sums.values()],
            "packed": True,
        }

    @torch.no_grad()
    def _send(self) -> None:
        self._transfer.NCCLWeightTransferEngine.trainer_send_weights(
            iterator=whole_tensors(self._trainer),
            trainer_args=self._transfer.NCCLTrainerSendWeightsArgs(group=self._group, packed=True),
        )
