# Everything a newcomer or CI runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
FAST := losses weightings lists scores lambdas thompson_sampling chat data list_data checkpoint seeding fused items \
	old_runs

TORTURE_MINUTES ?= 30
# TORCH=torch==X tries another version of torch than the pinned one in test-oldest and test-newest.
TORCH ?= $(shell grep '^torch==' requirements.lock)
PIP := pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help env quickstart smollm2 bench test test-fast test-slurm test-gpu test-oldest test-newest test-in \
	torture check licenses audit format lock clean

help:  ## List these targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY)  ## Create .venv with the pinned packages

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

quickstart: env  ## Train a tiny policy against seven tiny references, no downloads
	$(BIN)/python train.py experiment=quickstart

smollm2: env  ## Fetch SmolLM2-135M-Instruct (93 MB) and convert it, for experiment=smollm2
	$(BIN)/python -m mrpo_lab.embedded.smollm2

bench: env  ## Compare speed and memory with TRL on the starter pairs, after `make smollm2`; 20 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock trl==1.16.0
	$(BIN)/python -m benchmarks

test: env  ## Run all tests
	$(BIN)/python -m pytest

test-fast: env  ## Run the tests that find most mistakes, in a minute
	$(BIN)/python -m pytest $(FAST:%=tests/test_%.py)

torture: env  ## Try faults at random for TORTURE_MINUTES (30); TORTURE_SEED=N tries the same ones again
	PYTHONPATH=tests $(BIN)/python -m torture --minutes $(TORTURE_MINUTES) $(TORTURE_SEED:%=--seed %) $(TORTURE_KINDS:%=--kinds %)

test-oldest:  ## Run the fast tests and the quickstart with the oldest allowed packages
	mkdir -p $(VENV)-oldest
	$(PYTHON) tests/dependencies.py oldest > $(VENV)-oldest/oldest.txt
	$(MAKE) test-in FOLDER=$(VENV)-oldest CONSTRAINTS='-c $(VENV)-oldest/oldest.txt'

test-newest:  ## The same with the newest allowed packages
	$(MAKE) test-in FOLDER=$(VENV)-newest

test-in:
	$(PYTHON) -m venv $(FOLDER)
	$(FOLDER)/bin/$(PIP) $(TORCH)
	$(FOLDER)/bin/$(PIP) $(CONSTRAINTS) -e '.[dev]'
	$(FOLDER)/bin/python -m pytest $(FAST:%=tests/test_%.py)
	$(FOLDER)/bin/python train.py experiment=quickstart outputs=$(FOLDER)/outputs
	$(FOLDER)/bin/pip freeze --exclude-editable
	rm -rf $(FOLDER)

test-slurm: env  ## Run sweeps on a throw-away SLURM, as root on Debian (tests/slurm/cluster.py install)
	$(BIN)/python -m pytest tests/slurm -n 0

test-gpu: env  ## Run the tests that need a GPU, or say why they are skipped
	$(BIN)/python -m pytest -m gpu -n 0 -rs

check: env  ## Lint, format, type-check, and check which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

licenses: env  ## Write docs/licenses.md; fail on a licence that is not known
	$(BIN)/python tests/dependencies.py licenses > licenses.new
	mv licenses.new docs/licenses.md

audit:  ## Look for known vulnerabilities of the pinned packages; needs the network
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/$(PIP) pip-audit
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock
	rm -rf $(VENV)-audit

format: env  ## Mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## Write requirements.lock anew from pyproject.toml, torch kept at its pin
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(VENV)-lock/bin/pip install --quiet -e '.[dev]'
	{ sed -n '/^#/p' requirements.lock; \
	  $(VENV)-lock/bin/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/' \
	  | grep -vE '^(nvidia-|triton==|cuda-)'; } > requirements.new
	mv requirements.new requirements.lock
	rm -rf $(VENV)-lock

clean:  ## Remove the environment and tool caches; outputs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
