"""Every change that megatron_k2 makes to upstream objects, as records (see ``patch.py``).

Only ``megatron_k2.register`` applies them. Core patches serve every device; CPU patches make up
the opt-in device layer and are never active on CUDA. ``README.md`` is the generated ledger.
"""

from megatron_k2.patches.cpu import (
    gpu_affinity,
    hide_gpu_packages,
    host_offload,
    host_torch,
    record_stream,
    rng_state,
    scale_in_place,
    share_storage,
    tensor_cuda,
    tensor_types,
    tiled_cross_entropy,
)
from megatron_k2.patches.megatron_core import (
    adam_state_dict,
    adam_step_count,
    adam_step_is_no_shard,
    adam_step_load,
    async_queue,
    async_result_queue,
    chained_optimizer_count,
    compile_helpers,
    expert_balance_log,
    expert_bias_rule,
    k2_arguments,
    kimi_tokenizer,
    load_verified,
    max_logit_log,
    muonclip_optimizer,
    offload_groups,
    recompute_without_te,
    save_files,
    save_guard,
)
from megatron_k2.patches.patch import Patch, PatchError

ALL_PATCHES: tuple[Patch, ...] = (
    hide_gpu_packages.PATCH,
    host_torch.PATCH,
    tensor_cuda.PATCH,
    record_stream.PATCH,
    rng_state.PATCH,
    scale_in_place.PATCH,
    tiled_cross_entropy.PATCH,
    share_storage.PATCH,
    *tensor_types.PATCHES,
    *offload_groups.PATCHES,
    *host_offload.PATCHES,
    gpu_affinity.PATCH,
    compile_helpers.PATCH,
    *k2_arguments.PATCHES,
    *kimi_tokenizer.PATCHES,
    adam_step_count.PATCH,
    adam_state_dict.PATCH,
    adam_step_load.PATCH,
    adam_step_is_no_shard.PATCH,
    chained_optimizer_count.PATCH,
    async_result_queue.PATCH,
    async_queue.PATCH,
    *save_files.PATCHES,
    *save_guard.PATCHES,
    load_verified.PATCH,
    *max_logit_log.PATCHES,
    *muonclip_optimizer.PATCHES,
    recompute_without_te.PATCH,
    expert_bias_rule.PATCH,
    expert_balance_log.PATCH,
)

__all__ = ["ALL_PATCHES", "Patch", "PatchError"]
