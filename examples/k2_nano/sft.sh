#!/usr/bin/env bash
# A chat model with tools on two CPU cores: tokenizer, a short pretraining, fine-tuning, its export.
# Stop it any time; the same command goes on. Then: examples/k2_nano/serve.sh
#   examples/k2_nano/sft.sh [OUT]          PRESET=k2-micro examples/k2_nano/sft.sh out/micro
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/sft}
preset=${PRESET:-k2-nano}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONPATH=.
mkdir -p "$out"

train() { # MODULE ARGS...: two processes, experts over both
  "$python" -m torch.distributed.run --nproc-per-node 2 --no-python \
    "$python" -W ignore -m "$@" --k2-preset "$preset" --tokenizer-type KimiTiktokenTokenizer \
    --tokenizer-model "$out/kimi" --vocab-size 2048 --seq-length 512 --micro-batch-size 2 \
    --expert-model-parallel-size 2 --use-distributed-optimizer --optimizer muonclip \
    --lr-decay-style linear --min-lr 0 --lr-warmup-iters 5 --log-interval 10 --num-workers 0 \
    --dist-ckpt-optim-fully-reshardable --save-interval 50 --eval-interval 50
}

if [ ! -e "$out/kimi/tiktoken.model" ]; then
  mkdir -p "$out/kimi"
  "$python" examples/k2_nano/dialogues.py --text "$out/text.jsonl"
  "$python" examples/k2_nano/dialogues.py "$out/dialogues.jsonl" 4000
  "$python" tools/preprocess_data.py train-tokenizer --type kimi --input "$out"/text.jsonl \
    --vocab-size 2048 --sample-bytes 2000000 --output "$out/kimi/tiktoken.model"
fi
if [ ! -e "$out/text.json" ]; then
  "$python" tools/preprocess_data.py --input "$out/text.jsonl" --output-prefix "$out/text" \
    --tokenizer-type KimiTiktokenTokenizer --tokenizer-model "$out/kimi" --append-eod --workers 2
fi
if [ ! -e "$out/chat.json" ]; then
  "$python" tools/preprocess_sft.py --input "$out/dialogues.jsonl" --output-prefix "$out/chat" \
    --tokenizer-model "$out/kimi" --seq-length 512 --heldout-share 0.05 --workers 2
fi
train megatron_k2.training.pretrain --data-path "$out/text_text_document" --split 98,2,0 \
  --save "$out/base" --load "$out/base" --global-batch-size 4 --train-iters 100 --lr 6e-3 \
  --eval-iters 2
start=(--load "$out/base" --finetune)
if [ -e "$out/tuned/latest_checkpointed_iteration.txt" ]; then start=(--load "$out/tuned"); fi
train megatron_k2.training.sft "${start[@]}" --save "$out/tuned" \
  --train-data-path "$out/chat_train" --valid-data-path "$out/chat_heldout" \
  --global-batch-size 8 --train-iters 150 --lr 4e-3 --eval-iters 2
if [ ! -e "$out/hf/config.json" ]; then
  "$python" tools/convert_checkpoint.py to-hf "$out/tuned" "$out/hf"
fi
echo "[sft] $out/tuned, and $out/hf for transformers; talk to it: examples/k2_nano/serve.sh $out"
