# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?= configs/caption.yaml
ARGS ?=
PYTEST := $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-integration test-faults test-gpu test-all check docs format benchmark caption plan evaluate submit

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(STAMP)  ## virtual environment in .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "needs Python 3.11 or newer, found " + sys.version.split()[0] + ": set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	-$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lmms-eval  # a test reads its scorers
	@touch $@

demo: $(STAMP)  ## caption a synthetic dataset and check the answers (half a minute; out/demo)
	@$(PY) -m pipeline.demo.manifest --output out/demo-world
	@$(PY) -m jobs.caption --config configs/demo.yaml $(ARGS)
	@$(PY) -m pipeline.demo.check out/demo

test: $(STAMP)  ## unit tests and a short end-to-end run (under three minutes)
	$(PYTEST) -n auto --dist loadfile -m 'not slow and not gpu' tests/unit $(ARGS)
	$(PYTEST) -m 'end_to_end and not slow' tests/integration

test-integration: $(STAMP)  ## tests with a real Ray, servers and the command line, and the slow unit tests (25 minutes)
	$(PYTEST) -m 'not end_to_end or slow' tests/integration $(ARGS)
	$(PYTEST) -n auto -m 'slow and not gpu' tests/unit

test-faults: $(STAMP)  ## runs killed at random moments and resumed, lost nodes, a full disk (15 minutes; FAULT_RUNS=40)
	$(PYTEST) -s --timeout=1800 tests/faults $(ARGS)

test-gpu: $(if $(filter command,$(origin PY)),,$(STAMP))  ## tests that need an NVIDIA GPU; PY=python3 takes that Python as it is
	$(PYTEST) -m gpu tests/gpu $(ARGS)

test-all: test test-integration test-faults  ## all tests that run without a GPU (40 minutes)

check: $(STAMP)  ## formatting, lint and types
	$(PY) -m ruff format --check pipeline jobs tests
	$(PY) -m ruff check pipeline jobs tests
	$(PY) -m mypy --strict pipeline jobs

format: $(STAMP)  ## format the code
	$(PY) -m ruff format pipeline jobs tests
	$(PY) -m ruff check --fix pipeline jobs tests

docs: $(STAMP)  ## write the generated pages of docs/
	$(PY) -m jobs.documentation

benchmark: $(STAMP)  ## measure: make benchmark ARGS='preprocess' or ARGS='engine --shape small'
	$(PY) -m jobs.benchmark $(or $(ARGS),preprocess)

evaluate: $(STAMP)  ## answer and score held-out synthetic questions (a minute; out/evaluate)
	@$(PY) -m pipeline.demo.manifest --output out/held-out-world --rows-per-task 72 --seed 5
	@$(PY) -m jobs.evaluate --config configs/evaluate.yaml $(ARGS)

caption: $(STAMP)  ## caption a manifest: make caption CONFIG=configs/caption.yaml ARGS='--input.path ...'
	$(PY) -m jobs.caption --config $(CONFIG) $(ARGS)

plan: $(STAMP)  ## forecast what a job will need: make plan CONFIG=... ARGS='--gpu H200 --price-per-gpu-hour 3.5'
	@$(PY) -m jobs.plan --config $(CONFIG) $(ARGS)

submit: $(STAMP)  ## run a job on a cluster: make submit ADDRESS=http://127.0.0.1:8265 CONFIG=... ARGS='--input.path ...'
	@$(PY) -m jobs.submit $(if $(ADDRESS),--address $(ADDRESS)) --config $(CONFIG) $(ARGS)
