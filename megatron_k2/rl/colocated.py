"""The local engine over the trainer's own modules: K2's synchronous, colocated mode.

Trainer and engine take turns in the same processes (arXiv 2507.20534, 3.3.1). Nothing is copied:
the optimizer changes parameters in place, and a sync binds the engine to them anew. With tensor or
expert parallelism the ranks of one model copy decode together: the first *leads*, runs the event
loop, environments and judges; the others follow until it releases them. Each data-parallel copy is
an engine of its own, and so is each context-parallel rank: it holds all weights, and answers whole
sequences of its own while the trainer shares every row.

A sync is checked by log-probabilities of a fixed prompt, and in one process by checksums of every
tensor too. With LoRA the frozen base stays as it was bound and the adapters are added anew.

Left out: freeing the trainer's memory for the engine, which K2 does and a CPU has no need of.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_k2.adapters import is_adapter
from megatron_k2.checkpoint.hf.model import ModelShape
from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.local import LocalEngine
from megatron_k2.engine.ranks import RankedCore, engine_group
from megatron_k2.engine.scheduler import Limits
from megatron_k2.rl.run_play import Rollout
from megatron_k2.rl.sync.fingerprint import TOLERANCE_NATS, Fingerprint, SyncRefused, differences
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.in_process import InProcessSync
from megatron_k2.rl.sync.live import LiveWeights
from megatron_k2.rl.sync.local import LocalReceiver
from megatron_k2.rl.sync.probe import engine_top, trainer_top

TURN = 8  # steps of the engine before an episode looks at its tokens


class ColocatedEngine:
    """The engine of this rank's model copy.

    Args:
        chunks: the trainer's model, one chunk, wrapped.
        shape: of the model, for the fingerprint's names.
        limits: of the engine.
        vocab_size: without padding.
        groups: process groups.
        record_routes: return the experts of each token.
        threads: of the engine on the CPU.

    Attributes:
        is_leader: of this copy's ranks.
        engine: on the leader: what rollouts sample from.
        num_copies, copy: engines of the run, and which of them this is.

    Collective: the constructor over all ranks; every method over the ranks of the copy.
    """

    def __init__(
        self,
        chunks: list[Any],
        shape: ModelShape,
        limits: Limits,
        vocab_size: int,
        groups: Any,
        *,
        version: int = 0,
        record_routes: bool = False,
        threads: int = 1,
    ) -> None:
        self._model = unwrap_model(chunks[0])
        self._vocab_size = vocab_size
        self._group = engine_group(groups)
        served = _WholeSequences(self._model)
        options: dict[str, Any] = dict(
            vocab_size=vocab_size, weight_version=version, record_routes=record_routes
        )
        self._alone = self._group.size() == 1
        self._core: LocalCore
        if self._alone:
            self._core = LocalCore(served, limits, **options)
            self.is_leader = True
        else:
            # In-place changes are there already: the engine only binds them anew.
            ranked = RankedCore(served, limits, groups, change=lambda _: None, **options)
            self._core, self.is_leader = ranked, ranked.is_leader
        self._dtype = "F32" if self._model.config.params_dtype == torch.float32 else "BF16"
        self._loop = asyncio.new_event_loop()
        ranks = torch.distributed.get_process_group_ranks(self._group)
        firsts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(firsts, ranks[0])
        self.num_copies, self.copy = len(set(firsts)), sorted(set(firsts)).index(ranks[0])
        if self.is_leader:
            self._local = LocalEngine(self._core, threads, TURN)
            self.engine = GatedEngine(self._local)
            self._sync: InProcessSync | None = None
            if self._alone and not has_adapters(self._model):
                weights = LiveWeights([served], shape, self._dtype)
                receiver = LocalReceiver(self._local, self._core, weights)
                self._sync = InProcessSync(weights, receiver, self.engine, vocab_size)

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run ``work`` on the leader, with the other ranks at its service; None on those.

        Raises:
            Whatever it raises, on the leader.
        """
        if not self.is_leader:
            _ranked(self._core).follow()
            return None
        try:
            return self._loop.run_until_complete(self._with_turns(work))
        finally:
            if not self._alone:
                _ranked(self._core).release()

    async def _with_turns(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Let the engine take turns while ``work`` runs: after it the weights are the trainer's."""
        await self._local.resume()
        try:
            return await work()
        finally:
            await self._local.pause()

    def sync(self, version: int) -> None:
        """Bind the engine to the trainer's weights as they are now; compare, then open the gate.

        Raises:
            SyncRefused: what the engine computes is not what the trainer computes; on all ranks.
        """
        if self.is_leader and (sync := self._sync) is not None:
            self._loop.run_until_complete(self._with_turns(lambda: sync.push(version)))
            return
        trainer = trainer_top(self._model, self._vocab_size)
        found = self.run(lambda: self._rebind(version, trainer))
        box = [found]
        leader = torch.distributed.get_process_group_ranks(self._group)[0]
        torch.distributed.broadcast_object_list(box, src=leader, group=self._group)
        if box[0]:
            raise SyncRefused(box[0])

    async def _rebind(self, version: int, trainer: Any) -> str:
        """Return what differs, an empty text where nothing does."""
        self.engine.begin(version)
        if self._alone:
            await self._local.update_weights(version, lambda: None)
        else:
            await self._local.between_steps(_ranked(self._core).change_weights, version)
        engine = await engine_top(self._local, self._vocab_size, version)
        sides = Fingerprint(version, None, trainer), Fingerprint(version, None, engine)
        found = "; ".join(differences(*sides, TOLERANCE_NATS[self._dtype]))
        if found:
            self.engine.refuse(version, f"weights {version}: {found}")
            return f"weights {version}: {found}"
        self.engine.confirm(version)
        return ""

    def close(self) -> None:
        """End the engine on all ranks of the copy."""
        if self.is_leader:
            self._loop.run_until_complete(self._local.close())
        else:
            _ranked(self._core).follow()
        self._loop.close()


class _WholeSequences:
    """The model as the engine reads it: the trainer's weights, no context parallelism.

    The engine has a forward of its own over the weights and refuses a configuration that splits
    sequences, which its own do not.
    """

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, copy.copy(model.config)
        self.config.context_parallel_size = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **fields: Any) -> Any:
        """Run the trainer's own forward, over context-parallel ranks."""
        return self._model(*args, **fields)


def has_adapters(model: torch.nn.Module) -> bool:
    """Tell whether a model has LoRA's factors, which the engine adds to its copies."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def _ranked(core: LocalCore) -> RankedCore:
    assert isinstance(core, RankedCore)
    return core


def engine_limits(context: int, rules: Rollout) -> Limits:
    """Return the engine's limits of a run; ``cache_tokens`` 0: enough for all that run at once."""
    tokens = rules.cache_tokens or context * rules.max_running
    keeps = rules.keeps_pages or rules.old_latents
    step_tokens = max(512, rules.max_running + 1)
    return Limits(context, max(context, tokens), rules.max_running, step_tokens, keeps_pages=keeps)
