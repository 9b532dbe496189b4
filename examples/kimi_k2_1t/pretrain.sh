#!/usr/bin/env bash
# Kimi K2, the first stage of its recipe (4k context), on 32 or more nodes of 8 GPUs.
# NOT RUN by us: no cluster. Stages of such a layout are built in tests/distributed/test_fake_world.py.
#   DATA_PREFIX=/data/corpus TOKENIZER=/data/tokenizer.model NODES=32 NODE_RANK=0 MASTER=host0 \
#     bash examples/kimi_k2_1t/pretrain.sh
set -euo pipefail
: "${DATA_PREFIX:?prefix of a .bin/.idx pair}" "${TOKENIZER:?tokenizer model}"
: "${NODES:?32 times a power of two}" "${NODE_RANK:?0 to NODES-1}" "${MASTER:?host of node 0}"
: "${OUT:=out/kimi_k2}"

# Kimi K2 report, section 2.4: PP16 with virtual stages, EP16, ZeRO-1, no TP; the 61 layers are
# placed unevenly (the report does not say how), one layer a virtual stage beside loss and embedding.
PARALLEL=(
  --pipeline-model-parallel-size 16 --expert-model-parallel-size 16
  --pipeline-model-parallel-layout "Et|t|(tt|)*29tL"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --overlap-moe-expert-parallel-comm --delay-wgrad-compute
)
# Section 2.4.3 (recomputation, FP8 storage of two activations, offloading) comes with the preset.
# Section 2.1: MuonClip. Its pieces of matrices travel in 16 bits; at 256 GPUs nothing shards the
# experts' momenta and fp32 weights (34 GB a GPU), so they lie in host memory between steps.
OPTIMIZER=(
  --optimizer muonclip --qk-clip-threshold 100 --k2-muon-wire bf16 --k2-optimizer-offload all
)
# Section 2.5: schedule and batch come with the preset; 230,968 steps are 15.5T tokens.
# The preset is the released model, stretched to 128k; this stage comes before YaRN stretches.
TRAINING=(--micro-batch-size 1 --train-iters 230968 --rotary-scaling-factor 1)

torchrun --nproc-per-node 8 --nnodes "$NODES" --node-rank "$NODE_RANK" \
  --master-addr "$MASTER" --master-port 29500 \
  -m megatron_k2.training.pretrain --k2-preset kimi-k2 \
  "${PARALLEL[@]}" "${OPTIMIZER[@]}" "${TRAINING[@]}" \
  --data-path "$DATA_PREFIX" --tokenizer-type SentencePieceTokenizer \
  --tokenizer-model "$TOKENIZER" --split 999,1,0 \
  --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 500 --async-save \
  --eval-interval 1000 --eval-iters 10 --tensorboard-dir "$OUT/tensorboard" --log-interval 1
