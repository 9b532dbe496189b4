"""The symbols of NVIDIA apex that Megatron calls are exactly those compat looks for.

apex cannot be installed from PyPI (the package of that name is another project), so compat
recognises it by these symbols. If upstream begins to call another one, this fails by name.
"""

import ast

import pytest

from megatron_k2 import compat
from tests.contracts.upstream_source import module_file

# Upstream module -> what it takes from apex and its extensions, in compat's notation.
SITES = {
    "megatron.core.optimizer": {"apex.optimizers:FusedAdam", "apex.optimizers:FusedSGD"},
    "megatron.core.optimizer.distrib_optimizer": {"apex.optimizers:FusedAdam"},
    "megatron.core.optimizer.optimizer": {
        "apex.multi_tensor_apply:multi_tensor_applier",
        "amp_C:multi_tensor_scale",
    },
    "megatron.core.optimizer.clip_grads": {
        "apex.multi_tensor_apply:multi_tensor_applier",
        "amp_C:multi_tensor_l2norm",
        "amp_C:multi_tensor_scale",
    },
    "megatron.training.utils.common_utils": {
        "apex.multi_tensor_apply:multi_tensor_applier",
        "amp_C:multi_tensor_l2norm",
    },
    "megatron.core.tensor_parallel.layers": {
        "fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp32",
        "fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp16",
    },
    "megatron.core.utils": {
        "fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp32",
        "fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp16",
    },
}
PACKAGES = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")
# The plain SGD is never asked for by a K2 run.
UNUSED = {"apex.optimizers:FusedSGD"}


def symbols_taken(module: str) -> set[str]:
    """What a module imports by name from apex, or reads from an extension it imports whole."""
    path = module_file(module)
    assert path is not None, f"{module} is gone"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            found |= {f"{node.module}:{alias.name}" for alias in node.names}
        match node:
            case ast.Attribute(value=ast.Name(id=package), attr=name) if package in PACKAGES:
                found.add(f"{package}:{name}")
    return found


@pytest.mark.parametrize("module", sorted(SITES))
def test_upstream_takes_exactly_these_symbols_of_apex(module: str) -> None:
    assert symbols_taken(module) == SITES[module]


def test_compat_looks_for_exactly_the_symbols_that_upstream_takes() -> None:
    assert set(compat.APEX_SYMBOLS) == set.union(*SITES.values()) - UNUSED
