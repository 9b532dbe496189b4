"""Every change that megatron_k2 makes to upstream objects, as records (see ``patch.py``).

Only ``megatron_k2.register`` applies them. Core patches serve every device; CPU patches make up
the opt-in device layer and are never active on CUDA. ``README.md`` is the generated ledger.
"""

from megatron_k2.patches.cpu import hide_gpu_packages, host_torch, rng_state, tensor_cuda
from megatron_k2.patches.cpu import tensor_types
from megatron_k2.patches.megatron_core import compile_helpers, k2_arguments
from megatron_k2.patches.patch import Patch, PatchError

ALL_PATCHES: tuple[Patch, ...] = (
    hide_gpu_packages.PATCH,
    host_torch.PATCH,
    tensor_cuda.PATCH,
    rng_state.PATCH,
    *tensor_types.PATCHES,
    compile_helpers.PATCH,
    *k2_arguments.PATCHES,
)

__all__ = ["ALL_PATCHES", "Patch", "PatchError"]
