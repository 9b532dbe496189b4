#!/usr/bin/env bash
# Kimi K2's recipe without a scheduler: run this on every node, all at about the same time.
# NOT RUN by us on more than one node: no cluster. OUT must lie on a file system that all see.
#   export TOKENIZER=... WEB=... CODE=... MATH=... KNOWLEDGE=... LONG=... LONG_HELDOUT=...
#   NODES=32 NODE_RANK=0 MASTER=host0 bash examples/kimi_k2_1t/torchrun.sh
set -euo pipefail
: "${NODES:?32 times a power of two}" "${NODE_RANK:?0 to NODES-1}" "${MASTER:?host of node 0}"
# Seconds from SIGTERM to SIGKILL that torchrun leaves the ranks to save; its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-800}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

exec .venv/bin/python tools/run_recipe.py "${RECIPE:-examples/kimi_k2_1t/recipe.toml}" \
  --nodes "$NODES" --node-rank "$NODE_RANK" --master "$MASTER" --out "${OUT:-out/kimi-k2}"
