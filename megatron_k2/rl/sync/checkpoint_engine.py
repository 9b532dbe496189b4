"""Moonshot's checkpoint-engine: the broadcast that K2 was trained with. Not run.

https://github.com/MoonshotAI/checkpoint-engine, README and examples/update.py: every rank registers
its share of the tensors in host memory, and the ranks broadcast them bucket by bucket into buffers
that the vLLM workers of the same GPUs map (``--worker-extension-cls
checkpoint_engine.worker.VllmColocateWorkerExtension``). Its published time for K2 in FP8 on 256 H20
is 16 s. vLLM shows no weights: log-probabilities are compared.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_k2.compat import optional
from megatron_k2.rl.sync.base import Push
from megatron_k2.rl.sync.fingerprint import TOLERANCE_NATS, Fingerprint
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.live import LiveWeights
from megatron_k2.rl.sync.probe import trainer_top
from megatron_k2.rl.sync.servers import ServerReceiver
from megatron_k2.rl.sync.whole import whole_tensors


class CheckpointEngineSync(Push):
    """``WeightSync`` by broadcast; every rank of the trainer pushes, each with its own receiver.

    Args:
        trainer: all layers on a rank; ``group`` of all ranks.
        receiver: of the server on this rank's GPUs; its first rank speaks to it.
        gate: what rollouts sample from.
        server_url: of that server, without /v1.
        ranks_a_server: GPUs of one server, consecutive ranks.

    Raises:
        ImportError: checkpoint-engine is missing; with the line that installs it.
    """

    def __init__(
        self,
        trainer: LiveWeights,
        receiver: ServerReceiver,
        gate: GatedEngine,
        server_url: str,
        ranks_a_server: int,
    ) -> None:
        super().__init__(receiver, gate, TOLERANCE_NATS[trainer.dtype])
        optional("checkpoint_engine").require()
        self._package = importlib.import_module("checkpoint_engine.ps")
        self._parameters = self._package.ParameterServer(auto_pg=True)
        self._trainer, self._server = trainer, receiver
        self._url, self._ranks_a_server = server_url, ranks_a_server

    async def _publish(self, version: int) -> Fingerprint:
        sums = await asyncio.to_thread(self._trainer.sums)
        vocab_size = self._trainer.shape.vocab_size
        top = await asyncio.to_thread(trainer_top, self._trainer.chunks[0], vocab_size)
        return Fingerprint(version, sums, top)

    async def _bring(self, version: int) -> None:
        await asyncio.to_thread(self._broadcast, f"v{version:06d}")
        self._server.engine.weight_version = version

    @torch.no_grad()
    def _broadcast(self, name: str) -> None:
        """Register this rank's share and broadcast. Collective over the trainer's ranks."""
        parameters = self._parameters
        parameters.register_checkpoint(name, named_tensors=self._share())
        try:
            parameters.gather_metas(name)
            parameters.update(name, self._tell)
        finally:
            parameters.unregister_checkpoint(name)

    def _share(self) -> dict[str, Tensor]:
        """Return every n-th tensor, of n ranks, in host memory."""
        group = self._trainer.group
        rank, count = (0, 1) if group is None else (group.rank(), group.size())
        tensors = enumerate(whole_tensors(self._trainer))
        return {name: one.cpu() for index, (name, one) in tensors if index % count == rank}

    def _tell(self, sockets: list[tuple[str, str]]) -> None:
        """Have the first rank of each server tell its workers where the buffers are."""
        group: Any = self._trainer.group
        rank = 0 if group is None else group.rank()
        if rank % self._ranks_a_server == 0:
            own = dict(sockets[rank : rank + self._ranks_a_server])
            self._package.request_inference_to_update(f"{self._url}/collective_rpc", own)
