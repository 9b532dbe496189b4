"""Specs of K2's MoE and dense MLP layers, and the MoE layer that picks a dispatcher for its device.

With Transformer Engine the specs are upstream's (TEGroupedMLP, TE linears) and only the router is
ours. Without, experts, shared expert and dense MLP are the classes of this package. Every class is
a true subclass of upstream's, which the overlapped expert-parallel schedule requires.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MlpBuilder
from torch import Tensor

from megatron_k2.device import is_on_host
from megatron_k2.model.dispatcher import K2AlltoAllTokenDispatcher
from megatron_k2.model.experts import K2GroupedMLP
from megatron_k2.model.lora_experts import AdaptedGroupedMLP
from megatron_k2.model.mlp import K2MLP, K2SharedExpertMLP
from megatron_k2.model.router import K2TopKRouter
from megatron_k2.model.te_experts import K2TEMLP, K2TEGroupedMLP, K2TESharedExpertMLP


class K2MoELayer(MoELayer):
    """MoELayer whose all-to-all dispatcher suits the memory its experts live in."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        """Build upstream's layer; see ``MoELayer`` for the arguments."""
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        on_host = is_on_host(next(self.experts.parameters()))
        if config.moe_token_dispatcher_type == "alltoall" and on_host:
            self.token_dispatcher = K2AlltoAllTokenDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=config,
                pg_collection=pg_collection,
            )
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)

    def routed_experts_compute(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the routed experts' output, see ``MoELayer.routed_experts_compute``.

        A single rank hands tokens to the experts in token order, with the permutation.
        """
        dispatcher = self.token_dispatcher
        if not (isinstance(dispatcher, K2AlltoAllTokenDispatcher) and dispatcher.is_single_rank):
            return super().routed_experts_compute(hidden_states, probs)
        rows, counts, probs = dispatcher.dispatch_postprocess(hidden_states, probs)
        output, bias = self.experts(rows, counts, probs, dispatcher.permutation)
        return dispatcher.combine_preprocess(output), bias


def _local_mlp_submodules() -> MLPSubmodules:
    backend = LocalSpecProvider()
    return MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )


def get_k2_moe_spec(config: TransformerConfig, use_transformer_engine: bool) -> MlpBuilder:
    """Return the builder of a MoE layer for ``TransformerLayerSubmodules.mlp``.

    Args:
        config: the model's configuration.
        use_transformer_engine: upstream's TE experts and linears instead of ours.
    """
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        builder = get_mlp_module_spec_for_backend(
            backend=TESpecProvider(),
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            use_te_activation_func=config.use_te_activation_func,
        )
        submodules: MoESubmodules = builder.keywords["submodules"]  # type: ignore[attr-defined]
        submodules.router = K2TopKRouter
        if getattr(config, "k2_fp8_activations", None):
            experts: Any = submodules.experts
            shared: Any = submodules.shared_experts
            submodules.experts = partial(K2TEGroupedMLP, **experts.keywords)
            submodules.shared_experts = partial(K2TESharedExpertMLP, **shared.keywords)
        return partial(MoELayer, submodules=submodules)
    return partial(
        K2MoELayer,
        submodules=MoESubmodules(
            experts=AdaptedGroupedMLP if getattr(config, "k2_lora_rank", 0) else K2GroupedMLP,
            shared_experts=partial(K2SharedExpertMLP, submodules=_local_mlp_submodules()),
            router=K2TopKRouter,
        ),
    )


def get_k2_dense_mlp_spec(config: TransformerConfig, use_transformer_engine: bool) -> MlpBuilder:
    """Return the builder of a dense MLP for ``TransformerLayerSubmodules.mlp``.

    With Transformer Engine the first linear holds the pre-MLP norm, as in upstream's layer spec.
    """
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        dense: Any = get_mlp_module_spec_for_backend(
            backend=TESpecProvider(),
            num_experts=None,
            use_te_op_fuser=config.use_transformer_engine_op_fuser,
            use_te_activation_func=config.use_te_activation_func,
        )
        if getattr(config, "k2_fp8_activations", None):
            return partial(K2TEMLP.as_mlp_submodule, **dense.keywords)
        return dense  # type: ignore[no-any-return]
    return partial(K2MLP.as_mlp_submodule, submodules=_local_mlp_submodules())
