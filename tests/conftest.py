"""Environment of every test: threads and back ends are set before torch is imported.

One thread a process makes sums reproducible and lets several processes share the cores.
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
