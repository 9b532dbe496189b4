"""Environment of every test: threads and back ends are set before torch is imported.

One thread a process makes sums reproducible and lets several processes share the cores. Without a
GPU, GPU packages are hidden before any test module imports megatron, as ``register`` does first.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    CUDA_DEVICE_MAX_CONNECTIONS="1",  # Megatron asks for it under tensor parallelism
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
)

import torch

from megatron_k2.patches.cpu import hide_gpu_packages

if not torch.cuda.is_available():
    hide_gpu_packages.PATCH.apply()
