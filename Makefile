# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?= configs/caption.yaml
ARGS ?=
PYTEST := $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-faults test-gpu check format benchmark caption plan evaluate submit

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## virtual environment in .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "needs Python 3.11 or newer, found " + sys.version.split()[0] + ": set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## draw the demo world, caption it, compare with the truth (out/demo)
	@$(PY) -m pipeline.demo.manifest --output out/demo-world
	@$(PY) -m jobs.caption --config configs/demo.yaml $(ARGS)
	@$(PY) -m pipeline.demo.check out/demo

test: $(STAMP)  ## all tests that take seconds
	$(PYTEST) -m 'not slow and not gpu and not faults' $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes
	$(PYTEST) -m 'slow and not gpu and not faults' --timeout=1800 $(ARGS)

test-faults: $(STAMP)  ## runs killed at random moments and resumed: FAULT_RUNS=40
	$(PYTEST) -m faults -s $(ARGS)

test-gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu $(ARGS)

check: $(STAMP)  ## formatting, lint and types
	$(PY) -m ruff format --check pipeline jobs tests
	$(PY) -m ruff check pipeline jobs tests
	$(PY) -m mypy --strict pipeline jobs

format: $(STAMP)  ## put the code into its format
	$(PY) -m ruff format pipeline jobs tests
	$(PY) -m ruff check --fix pipeline jobs tests

benchmark: $(STAMP)  ## time it: make benchmark ARGS='preprocess' or ARGS='engine --shape small'
	$(PY) -m jobs.benchmark $(or $(ARGS),preprocess)

evaluate: $(STAMP)  ## draw held-out scenes, answer and score them, write the report (out/evaluate)
	@$(PY) -m pipeline.demo.manifest --output out/held-out-world --rows-per-task 72 --seed 5
	@$(PY) -m jobs.evaluate --config configs/evaluate.yaml $(ARGS)

caption: $(STAMP)  ## caption a manifest: make caption CONFIG=configs/caption.yaml ARGS='--input.path ...'
	$(PY) -m jobs.caption --config $(CONFIG) $(ARGS)

plan: $(STAMP)  ## what a job will need, before it runs: make plan CONFIG=... ARGS='--gpu H200 --price-per-gpu-hour 3.5'
	@$(PY) -m jobs.plan --config $(CONFIG) $(ARGS)

submit: $(STAMP)  ## the same on a cluster: make submit ADDRESS=http://127.0.0.1:8265 CONFIG=... ARGS='--input.path ...'
	@$(PY) -m jobs.submit $(if $(ADDRESS),--address $(ADDRESS)) --config $(CONFIG) $(ARGS)
