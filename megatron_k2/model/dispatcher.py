"""Upstream's all-to-all token dispatcher with row moves that are fast on a CPU.

Only the local moves differ (``permutation.py``); counts, splits and the exchange over expert
parallel ranks are upstream's. A single rank moves nothing: its experts read tokens and sum results
through the permutation. gloo wants split sizes as Python ints, and has no uneven all-gather or
reduce-scatter: over expert tensor parallelism both are an all-to-all here, whose gradient is the
other one. Capacity with padding takes upstream's path.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_k2.model.permutation import ChunkOrder, TokenPermutation


class K2AlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """MoEAlltoAllTokenDispatcher for tensors in host memory.

    Attributes:
        permutation: order of this forward's (token, expert) pairs; set by ``dispatch_preprocess``.
    """

    permutation: TokenPermutation

    @property
    def is_single_rank(self) -> bool:
        """Whether all experts are on this rank, whole: then tokens stay in token order."""
        return self.ep_size * self.tp_size == 1 and not self.drop_and_pad

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Count tokens, agree on the splits and copy tokens into expert order.

        Args:
            hidden_states: [sequence / TP, batch, hidden].
            routing_map: [tokens, experts] bool.
            probs: [tokens, experts] routing probabilities, zero where not routed.

        Returns:
            rows [pairs, hidden] (a single rank: tokens [tokens, hidden]), probabilities [pairs].

        Collective: all-gather of counts over the expert tensor and model parallel group.
        """
        if self.drop_and_pad:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        self.probs, self.routing_map = probs, routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(self, name)
            setattr(self, name, splits.tolist() if torch.is_tensor(splits) else splits)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.permutation = TokenPermutation(routing_map)
        rows = hidden_states.reshape(-1, self.hidden_shape[-1])
        if not self.is_single_rank:
            rows = self.permutation.scatter_rows(rows)
        return rows, probs.reshape(-1).index_select(0, self.permutation.pairs)

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather over expert tensor parallelism and sort by local expert.

        Returns:
            rows [rows, hidden] by expert, rows of each local expert, probabilities [rows].

        Collective: all-to-all over the expert tensor parallel group.
        """
        if self.drop_and_pad:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        if self.tp_size > 1:
            sizes, own = self.output_splits_tp, [global_input_tokens.shape[0]] * self.tp_size
            tokens = global_input_tokens.repeat(self.tp_size, 1)
            global_input_tokens = all_to_all(self.tp_group, tokens, sizes, own)
            probs = global_probs.repeat(self.tp_size)
            global_probs = all_to_all(self.tp_group, probs, sizes, own)
        self.chunk_order = None
        if self.num_local_experts > 1 and self.ep_size * self.tp_size > 1:
            self.chunk_order = ChunkOrder(self.num_global_tokens_per_local_expert)
            global_input_tokens = self.chunk_order.to_expert_order(global_input_tokens)
            global_probs = self.chunk_order.to_expert_order(global_probs)
        tokens_per_expert, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undo ``dispatch_postprocess`` for the experts' output [rows, hidden].

        Collective: all-to-all over the expert tensor parallel group.
        """
        if self.drop_and_pad:
            return super().combine_preprocess(hidden_states)
        if self.chunk_order is not None:
            hidden_states = self.chunk_order.to_source_order(hidden_states)
        if self.tp_size > 1:
            sizes = self.output_splits_tp
            own = sizes[self.tp_rank]
            shares = all_to_all(self.tp_group, hidden_states, [own] * self.tp_size, sizes)
            shares = shares.view(self.tp_size, own, hidden_states.shape[-1])
            hidden_states = shares.sum(0, dtype=self.probs.dtype).to(hidden_states.dtype)
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Sum the copies of each token and restore [sequence / TP, batch, hidden]."""
        if self.drop_and_pad:
            return super().combine_postprocess(permutated_local_input_tokens)
        output = permutated_local_input_tokens
        if not self.is_single_rank:
            output = self.permutation.sum_rows(output)
        output = output.view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        """Return the counts: in host memory there is nothing to copy or to wait for."""
        if self.drop_and_pad:
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        return tokens_per_expert
