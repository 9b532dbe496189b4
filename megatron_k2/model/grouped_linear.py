"""The weights of one layer of all local experts, without Transformer Engine.

One parameter [local experts, out, in] a layer: the layout that upstream calls a single grouped
weight. The sharded state dict has the keys, global shapes and offsets of ``TEGroupedLinear`` and of
``SequentialMLP`` (the expert axis in front), so that a checkpoint begun on a CPU resumes on CUDA
and the other way round. Expert tensor parallelism cuts the ffn dimension, gate and up alike. Weight
gradients wait for ``backward_dw`` under ``--delay-wgrad-compute``. Left out: biases.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as upstream_layers
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from megatron_k2.model.grouped_mlp import PendingWeightGradient

Offsets = tuple[tuple[int, int, int], ...]


class K2GroupedLinear(torch.nn.Module):
    """The weights of one layer of all local experts.

    Attributes:
        weight: [local experts, out, in], cut over expert tensor parallelism along ``partition_dim``
            (1: output, 2: input).
        pending: weight gradients that wait for ``backward_dw``.
    """

    partition_dim: int
    stride = 1
    save_original_input = True
    """What upstream asks of Transformer Engine's layers before it offloads their input: that the
    rows are kept, not an FP8 copy made for the product. These layers keep them in any case."""

    def __init__(
        self,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], None],
        bias: bool,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        """Allocate and initialise; arguments as upstream's ``GroupedLinearFc1Builder``.

        Raises:
            ValueError: a bias is asked for, or the size is not divisible by the expert tensor
                parallel size.
        """
        super().__init__()
        if bias:
            raise ValueError("--add-bias-linear: experts have no bias; use --disable-bias-linear")
        self.config, self.num_local_experts = config, num_local_experts
        self.ep_group, self.expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        self.tp_group = pg_collection.expt_tp
        shape = [num_local_experts, output_size, input_size]
        self._global_shape = tuple(shape[1:])
        if shape[self.partition_dim] % (self.stride * self.tp_group.size()):
            raise ValueError(
                f"--expert-tensor-parallel-size {self.tp_group.size()} must divide "
                f"--moe-ffn-hidden-size {shape[self.partition_dim] // self.stride}"
            )
        shape[self.partition_dim] //= self.tp_group.size()
        # Upstream's own layers ask the same name: under the CPU device layer it is the CPU.
        # With use_cpu_initialization the default device holds, and so does torch.device("meta").
        device = (
            None if config.use_cpu_initialization else upstream_layers.torch.cuda.current_device()
        )
        self.weight = torch.nn.Parameter(
            torch.empty(shape, device=device, dtype=config.params_dtype)
        )
        self._mark_weight()
        if config.perform_initialization:
            self._initialize(init_method)
        self.pending: deque[PendingWeightGradient] = deque()
        self._grad_hooks: list[Callable[[], None]] = []
        self._register_load_state_dict_pre_hook(self._read_upstream_layout)

    def _mark_weight(self) -> None:
        """Set the attributes by which upstream finds process groups, shards and gradient hooks."""
        config = self.config
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        self.weight.allreduce = not own_groups  # type: ignore[attr-defined]
        upstream_layers.set_tensor_model_parallel_attributes(
            self.weight, is_parallel=True, dim=self.partition_dim, stride=self.stride
        )
        if config.delay_wgrad_compute:
            self.weight.skip_backward_post_hook = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _initialize(self, init_method: Callable[[Tensor], None]) -> None:
        """Initialise expert by expert.

        With ``use_cpu_initialization`` every rank draws all experts of the model and keeps its own
        part, so that the weights do not depend on the layout (upstream's local experts begin equal
        on all expert-parallel ranks). Otherwise the expert-parallel generator is used, as upstream.
        """
        if not self.config.use_cpu_initialization:
            with tensor_parallel.get_cuda_rng_tracker().fork(
                get_expert_parallel_rng_tracker_name()
            ):
                for expert in self.weight:
                    init_method(expert)
            return
        first = self.ep_group.rank() * self.num_local_experts
        master = torch.empty(self._global_shape)
        for index in range(self.num_local_experts * self.ep_group.size()):
            init_method(master)
            if first <= index < first + self.num_local_experts:
                self.weight[index - first].copy_(self._local_part(master))

    def _local_part(self, whole: Tensor) -> Tensor:
        """Return this rank's shard of one expert's whole matrix [out, in]."""
        dim, rank, size = self.partition_dim - 1, self.tp_group.rank(), self.tp_group.size()
        return torch.cat(
            [part.chunk(size, dim)[rank] for part in whole.chunk(self.stride, dim)], dim
        )

    def _read_upstream_layout(
        self, state_dict: dict[str, Any], prefix: str, *unused: object
    ) -> None:
        """Accept ``weight0 .. weightN`` for ``weight`` and drop TE's extra states."""
        names = [f"{prefix}weight{index}" for index in range(self.num_local_experts)]
        if all(name in state_dict for name in names):
            state_dict[f"{prefix}weight"] = torch.stack([state_dict.pop(name) for name in names])
        for name in [name for name in state_dict if name.startswith(f"{prefix}_extra_state")]:
            del state_dict[name]
        state_dict[f"{prefix}_extra_state"] = None  # upstream's layers have one, and it is empty

    def backward_dw(self) -> None:
        """Compute the oldest waiting weight gradient and hand it to DDP's hooks.

        Raises:
            RuntimeError: no backward pass has run, or DDP was built without
                ``delay_wgrad_compute`` and would lose the gradient.
        """
        if not (self.config.delay_wgrad_compute and self.weight.requires_grad):
            return
        if not self.pending:
            raise RuntimeError(f"{self}: backward_dw before any backward pass")
        if hasattr(self.weight, "main_grad") and not self._grad_hooks:
            raise RuntimeError(
                f"{self}: DistributedDataParallelConfig.delay_wgrad_compute is False while the "
                "model's is True; the delayed gradient would be lost"
            )
        gradient = self.pending.popleft().compute()
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient
        for hook in self._grad_hooks:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Take what DDP wants called once the weight gradient exists."""
        self._grad_hooks.append(hook)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return ``weight`` as one sharded tensor over experts, plus upstream's empty extra states.

        Raises:
            ValueError: one key per expert is asked for (``singleton_local_shards``), which
                upstream uses with Megatron-FSDP only.
        """
        if (metadata or {}).get("singleton_local_shards"):
            raise ValueError("singleton_local_shards: K2GroupedLinear stores experts in one tensor")
        key = f"{prefix}weight"
        state: ShardedStateDict = {key: self._sharded(key, self.weight, tuple(sharded_offsets))}
        count, ep_rank = self.num_local_experts, self.ep_group.rank()
        replica = (0, self.tp_group.rank(), self.expt_dp_group.rank())
        for index in range(count):
            expert = (len(sharded_offsets), ep_rank * count + index, self.ep_group.size() * count)
            state[f"{prefix}_extra_state{index or ''}"] = make_sharded_object_for_checkpoint(
                None, f"{prefix}_extra_state", (*sharded_offsets, expert), replica_id=replica
            )
        return state

    def _sharded(
        self, key: str, tensor: Tensor, offsets: Offsets, is_cut: bool = True
    ) -> ShardedTensor | ShardedTensorFactory:
        """Return a tensor over (experts, out, in); with a stride, its parts one by one.

        Args:
            key: in the checkpoint.
            tensor: [local experts, rows, columns].
            offsets: of the layer.
            is_cut: as the weight over expert tensor parallelism; else whole on each of its ranks.
        """
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        replica = (0, 0 if is_cut else tp_rank, self.expt_dp_group.rank())
        axis, stride = len(offsets), self.stride
        experts = (axis, self.ep_group.rank(), self.ep_group.size())

        def shard(key: str, tensor: Tensor, part: int, replica_id: Any) -> ShardedTensor:
            cut = (axis + self.partition_dim, tp_rank + part * tp_size, tp_size * stride)
            places = (*offsets, experts, *([cut] if is_cut else []))
            return ShardedTensor.from_rank_offsets(
                key, tensor, *places, replica_id=replica_id, prepend_axis_num=axis
            )

        @torch.no_grad()
        def split(key: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
            parts = tensor.chunk(stride, self.partition_dim)
            return [shard(key, part, index, replica_id) for index, part in enumerate(parts)]

        @torch.no_grad()
        def join(parts: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(parts), self.partition_dim)

        if stride == 1 or not is_cut:
            return shard(key, tensor, 0, replica)
        return ShardedTensorFactory(key, tensor, split, join, replica)

    def get_extra_state(self) -> None:
        """Keep the state dict of upstream's layers, which have an (empty) extra state."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """Ignore extra state."""


class K2ColumnGroupedLinear(K2GroupedLinear):
    """fc1 of SwiGLU experts: gate rows, then up rows, each cut over expert tensor parallelism."""

    partition_dim = 1
    stride = 2


class K2RowGroupedLinear(K2GroupedLinear):
    """fc2 of the experts: input cut over expert tensor parallelism, output a partial sum."""

    partition_dim = 2
