#!/usr/bin/env bash
# Serves what sft.sh has trained, by the local engine, in OpenAI's form; asks it and evaluates it.
#   examples/k2_nano/serve.sh [OUT]          serve until Ctrl-C
#   examples/k2_nano/serve.sh [OUT] --check  serve, evaluate held-out dialogues, stop
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/sft}
python=${PYTHON:-.venv/bin/python}
port=${PORT:-8000}
serve=("$python" tools/serve.py --model "$out/tuned" --tokenizer "$out/kimi" --chat-format kimi-k2
  --served-model-name k2-nano --port "$port")
if [ "${2:-}" != --check ]; then exec "${serve[@]}"; fi

"${serve[@]}" --quiet &
server=$!
trap 'kill "$server"; wait "$server" || true' EXIT
until curl -sf "http://127.0.0.1:$port/health" >/dev/null; do
  kill -0 "$server"
  sleep 1
done
"$python" examples/k2_nano/talk.py "http://127.0.0.1:$port/v1"
"$python" examples/k2_nano/dialogues.py --tasks "$out"
"$python" tools/evaluate.py tools --dialogues "$out/calls.jsonl" --max-tokens 96 \
  --server "http://127.0.0.1:$port/v1" --model k2-nano --output "$out/evaluation/tools"
"$python" tools/evaluate.py exact --tasks "$out/tasks.jsonl" --max-tokens 48 \
  --server "http://127.0.0.1:$port/v1" --model k2-nano --output "$out/evaluation/exact"
