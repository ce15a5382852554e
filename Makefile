# Everything runs from a fresh clone: each target first creates .venv and installs what constraints.txt pins.
SHELL := /bin/bash
PROFILE ?= cpu
VENV ?= .venv
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-fast test-slow lint types lab nb-refresh report book clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install the pinned packages (1 to 3 minutes, once)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python >= 3.11 is needed; name one with make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,ltx2,book]'
	@touch $@

reproduce: $(STAMP) ## run the series and write its report; PROFILE=smoke|cpu|full|gpu (default cpu)
	$(BIN)/python -m omniforcing_lib reproduce --profile $(PROFILE) $(ARGS)

# A worker for each core; the long items, notebooks, come first. OpenMP's threads would fight over the cores.
WORKERS ?= auto
test: lint ## lint, tests, stored outputs, metrics, and the series with another seed, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  tests/test_series.py notebooks tests --nbval-lax --nbval-current-env \
	  --nbval-sanitize-with notebooks/sanitize.cfg --nbval-cell-timeout 480
	$(BIN)/python -m omniforcing_lib compare reports/metrics/smoke reports/runs/interactive/metrics

METHOD := layout masks attention rollout losses flow transformer stream
test-fast: $(STAMP) ## the laws of the method alone: masks, attention, cache, roll-out, losses, stream (a minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) $(METHOD:%=tests/test_%.py)

test-slow: $(STAMP) ## the long tests: teams of processes, kills, 2 GB files, an hour of stream
	$(BIN)/python -m pytest -q -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check the types of the method's modules by pyright, which is fetched
	$(BIN)/python -m pip install -q 'pyright[nodejs]==1.1.414'
	$(BIN)/pyright

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

nb-refresh: $(STAMP) ## run the notebooks in fresh kernels (smoke) and store their outputs
	$(BIN)/python -m omniforcing_lib refresh

report: $(STAMP) ## rebuild reports/REPORT.md from the committed metrics
	$(BIN)/python -m omniforcing_lib report

book: $(STAMP) ## build all pages and notebooks, as stored, into build/book/index.html; runs nothing
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/book

clean: ## remove caches and run folders; .venv stays
	rm -rf reports/runs .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
