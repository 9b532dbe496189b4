#!/usr/bin/env bash
# A 1 M model learns to spell words backward from verifiable reward: a little fine-tuning, then RL.
# Stop it any time; the same command goes on. `held out` lines are accuracy on words it never saw.
#   examples/k2_nano/rl.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/rl}
python=${PYTHON:-.venv/bin/python}
words='{"datasets": ["spell_backward"], "instruction": "",
        "parameters": {"spell_backward": {"min_word_len": 3, "max_word_len": 5}}}'
export OMP_NUM_THREADS=1 PYTHONPATH=.
mkdir -p "$out/kimi"

train() { # MODULE ARGS...: one process
  local module=$1
  shift
  "$python" -m torch.distributed.run --standalone --nproc-per-node 1 --no-python \
    "$python" -W ignore -m "$module" --k2-preset k2-micro --tokenizer-model "$out/kimi" \
    --vocab-size 596 --k2-precision fp32 --global-batch-size 8 --use-distributed-optimizer \
    --optimizer muonclip --num-workers 0 --seed 1 "$@"
}

if [ ! -e "$out/chat.json" ]; then
  "$python" tools/gym.py gold reasoning --num 2000 --system K2 --options "$words" \
    --output "$out/dialogues.jsonl"
  # Merges of the question's fixed words alone: letters stay tokens of their own.
  for _ in {1..200}; do
    echo '{"text": "Spell this word backward (example: sun -> nus): "}'
    for word in system user assistant K2 \
      "State the final answer to the following arithmetic problem: 3 + 4 ="; do
      echo "{\"text\": \"$word\"}"
    done
  done >"$out/fixed.jsonl"
  "$python" tools/preprocess_data.py train-tokenizer --type kimi --input "$out/fixed.jsonl" \
    --vocab-size 596 --output "$out/kimi/tiktoken.model"
  "$python" tools/preprocess_sft.py --input "$out/dialogues.jsonl" --seq-length 256 --workers 1 \
    --output-prefix "$out/chat" --tokenizer-model "$out/kimi" --heldout-share 0.02
fi
if [ ! -e "$out/base/latest_checkpointed_iteration.txt" ]; then
  train megatron_k2.training.sft --train-data-path "$out/chat_train" --eval-iters 0 \
    --seq-length 256 --micro-batch-size 4 --train-iters 116 --lr 1e-2 --min-lr 0 --lr-decay-style linear \
    --lr-warmup-iters 10 --log-interval 10 --save "$out/base" --save-interval 116
fi
train megatron_k2.training.rl --k2-rl-run examples/k2_nano/rl.toml --seq-length 1024 --lr 8e-4 --min-lr 0 \
  --lr-decay-style linear --pretrained-checkpoint "$out/base" \
  --save "$out/rl" --load "$out/rl" --save-interval 25
echo "[rl] figures: $out/rl/rl/metrics.jsonl; episodes to read: $out/rl/rl/rollouts_0"
