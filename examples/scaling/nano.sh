#!/usr/bin/env bash
# Four sparsities x three sizes x three seeds of nano models on two CPU cores, then fit and ask.
# Stop it any time; the same command goes on. Start it twice to use two cores: the runs are shared.
#   examples/scaling/nano.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/scaling}
python=${PYTHON:-.venv/bin/python}

"$python" tools/scaling_law.py run --output "$out" --preset k2-micro \
  --sizes 32x3 64x3 96x3 --sparsities 8 16 32 64 --seeds 1 2 3 \
  --tokens-per-weight 3 --seq-length 256 --batch 8 --vocab-size 1024 --heldout-bytes 30000 \
  --micro-batch-size 8 --lr 1e-2 --k2-device cpu --k2-precision fp32 --k2-threads 1 --num-workers 0
"$python" tools/scaling_law.py fit --output "$out" --figure "$out/scaling.png"
"$python" tools/scaling_law.py ask --output "$out" --budget 3e11
