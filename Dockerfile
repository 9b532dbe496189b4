# The GPU lane: CUDA 13, torch, Megatron-Core and Transformer Engine in the versions that were tried
# together on a machine without a GPU. BUILT NOWHERE BY US: there was neither Docker nor a GPU.
#   docker build -t megatron-k2 .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/out:/opt/megatron-k2/out" \
#       megatron-k2 --rung 1
# Pinned is what computes; what those packages and the extras data and serve ask for is pip's choice,
# and so are Ubuntu's packages.
# tests/unit/gpu_check/test_dockerfile.py holds the pins within the ranges of setup.py and compat.py.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential ca-certificates git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron-k2
RUN python3.12 -m venv .venv
ENV PATH=/opt/megatron-k2/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch first: it brings CUDA's libraries, cuDNN and NCCL, against which the next one is compiled.
RUN pip install \
        "torch==2.14.1" \
        "setuptools==84.2.1" \
        "wheel==0.48.0" \
        "ninja==1.13.2"

# Transformer Engine's torch extension is compiled here, half an hour of one core (tools/setup_te.sh
# does the same for a checkout). MAX_JOBS: files at once, 2 to 4 GB of memory each.
ARG MAX_JOBS=4
ENV CUDA_HOME=/usr/local/cuda NVTE_FRAMEWORK=pytorch
RUN site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && CPLUS_INCLUDE_PATH=$(printf '%s:' "$site"/nvidia/*/include) \
        NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=$MAX_JOBS \
        pip install --no-build-isolation \
        "torch==2.14.1" \
        "transformer-engine[core_cu13,pytorch]==2.20.2" \
        "nvidia-curand==10.4.0.35" \
        "nvidia-ml-py>=13,<14"

RUN pip install \
        "torch==2.14.1" \
        "megatron-core[training]==0.19.2" \
        "emerging-optimizers==0.3.0"

COPY . .
# The pins stand beside the package, so that nothing moves them.
RUN pip install --no-build-isolation -e '.[te,muon,data,serve]' \
        "torch==2.14.1" \
        "megatron-core[training]==0.19.2" \
        "transformer-engine[core_cu13,pytorch]==2.20.2" \
        "emerging-optimizers==0.3.0"

ENV CUDA_DEVICE_MAX_CONNECTIONS=1
ENTRYPOINT ["python", "tools/gpu_check.py"]
