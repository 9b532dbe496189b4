# Two commands for a fresh machine: `make pretrain` and `make test`. Each does all set-up itself.
#   make pretrain [INPUT=corpus.jsonl] [OUT=folder] [MINUTES=3]
#   make life     [OUT=folder]: everything that Kimi K2 went through, in small
SHELL := /bin/bash
PYTHON_VENV := .venv/bin/python
export PYTHON
# Set-up leaves compiling to the first import; without its result every process would compile anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup pretrain recipe-nano life gpu-check doctor test test-te test-vllm test-mcp evidence bench format lint docs-check clean

help:
	@echo "make pretrain    train k2-nano on real text: INPUT=file.jsonl OUT=folder MINUTES=3"
	@echo "make recipe-nano every stage of Kimi K2's recipe, made small: OUT=folder"
	@echo "make life        corpus to served model through every stage, with a report: OUT=folder"
	@echo "make test        ruff, mypy and the tests"
	@echo "make test-te     the tests of tests/te, in .venv-te with Transformer Engine (MAX_JOBS=1)"
	@echo "make test-vllm   an export in vLLM on the CPU, in .venv-vllm (6 GB)"
	@echo "make test-mcp    real MCP servers of PyPI and npm in the sandbox (130 MB)"
	@echo "make gpu-check   for whoever has GPUs: a report to send back: RUNG=1 DEVICE=cpu OUT=folder"
	@echo "make evidence    the heavy proofs that make test leaves out"
	@echo "make bench       every bench of tools/bench"
	@echo "make doctor      what is installed, what it enables, what is wrong"
	@echo "make setup       only .venv;  PYTHON=/path/to/python3.12 names the interpreter"
	@echo "make format | lint | docs-check | clean"

setup:
	@tools/bootstrap.sh

pretrain: setup
	@$(PYTHON_VENV) tools/pretrain_from_text.py $(if $(INPUT),--input "$(INPUT)") \
		$(if $(OUT),--out "$(OUT)") $(if $(MINUTES),--minutes "$(MINUTES)")

recipe-nano: setup
	@$(PYTHON_VENV) tools/run_recipe.py examples/kimi_k2_1t/recipe.toml --scale nano \
		$(if $(OUT),--out "$(OUT)")

life: setup
	@$(PYTHON_VENV) tools/life.py $(if $(OUT),--out "$(OUT)")

gpu-check: setup
	@$(PYTHON_VENV) tools/gpu_check.py $(if $(RUNG),--rung $(RUNG)) \
		$(if $(DEVICE),--device "$(DEVICE)") $(if $(OUT),--out "$(OUT)")

doctor: setup
	@$(PYTHON_VENV) -m megatron_k2 doctor

lint: setup
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m mypy

# Lanes side by side, the linters too: each leaves cores idle while it waits for other processes.
PYTEST := $(PYTHON_VENV) -m pytest -x -q -rs --durations=10
STARTS := tests/unit/training tests/unit/checkpoint tests/unit/gym tests/unit/rl tests/unit/engine
test: setup
	@logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; \
	$(MAKE) --no-print-directory lint >"$$logs/0" 2>&1 & first=$$!; \
	$(PYTEST) $(STARTS) >"$$logs/1" 2>&1 & second=$$!; \
	$(PYTEST) --ignore=tests/distributed $(STARTS:%=--ignore=%) >"$$logs/2" 2>&1 & third=$$!; \
	echo "tests/distributed; the linters and other tests run beside it, shown when all are done"; \
	$(PYTEST) tests/distributed; failed=$$?; \
	for lane in $$first $$second $$third; do wait $$lane || failed=1; done; \
	cat "$$logs/0" "$$logs/1" "$$logs/2"; exit $$failed

# Transformer Engine's real modules, without a GPU: needs nvcc, and a long first time.
test-te: setup
	@tools/setup_te.sh
	.venv-te/bin/python -m pytest -q -rs --durations=5 tests/te

# An export in vLLM on the CPU: a download of 6 GB.
test-vllm: setup
	@tools/setup_vllm.sh
	$(PYTHON_VENV) -m pytest -q -rs tests/vllm

# Real MCP servers in the sandbox: a download of 130 MB, needs node and git.
test-mcp: setup
	@tools/setup_mcp.sh
	$(PYTHON_VENV) -m pytest -q -rs tests/mcp

evidence: setup
	$(PYTHON_VENV) -m pytest -q -rs --durations=10 -m evidence

bench: setup
	@set -e; for bench in activation_memory attention chat convert generate moe_layer muonclip muonclip_traffic rollout sandbox \
		tokenize train_step; do \
		echo "== $$bench"; $(PYTHON_VENV) tools/bench/$$bench.py; done

format: setup
	$(PYTHON_VENV) -m ruff check --fix .
	$(PYTHON_VENV) -m ruff format .

docs-check: setup
	$(PYTHON_VENV) tools/docs_check.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
