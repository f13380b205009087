# Everything a developer types. `make` alone lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup run test test-extras test-faults check audit format bench dist clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
FAULTS ?= .faults

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make run ARGS="quant=w3a3 seed=1"     with overrides; ARGS=--help lists them all'
	@echo '  make setup PYTHON=/path/to/python     with another interpreter (3.11 or later)'

setup: $(STAMP)  ## Create .venv and install the package and its tools into it (once, and when pyproject.toml changes)

$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed, not '$(PYTHON)': make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

run: $(STAMP)  ## Train and measure the W4A4 student on the embedded digits (ARGS="..." are overrides)
	$(BIN)/python -m qdm_lightning.train $(ARGS)

test: $(STAMP)  ## Run all tests, as many at once as there are cores (ARGS="tests/unit -k taq" selects)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-extras: $(VENV)/.extras  ## Run what needs the extras (datasets, Trackio, MLflow, transformers, Optuna: installs them), or is long
	$(BIN)/python -m pytest -m extras $(ARGS)

$(VENV)/.extras: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev,hf,trackio,mlflow,transformers,optuna]'
	@touch $@

test-faults: $(STAMP)  ## Kills, damaged and hostile files, bad input: all of them (in FAULTS=.faults; the same command goes on)
	@for name in kills damage attacks bad_input; do \
		file=tests/faults/$$name.py; test -f "$$file" || continue; mkdir -p "$(FAULTS)/$$name"; \
		$(BIN)/python "$$file" --keep "$(FAULTS)/$$name" | tee "$(FAULTS)/$$name.txt"; test "$${PIPESTATUS[0]}" = 0 || exit 1; \
	done; \
	echo "-- all of them:"; for file in $(FAULTS)/*.txt; do tail -n 1 "$$file"; done; \
	for file in $(FAULTS)/*.txt; do tail -n 1 "$$file" | awk '{exit !($$NF > 0 && $$(NF-2) == $$NF)}' || exit 1; done

check: $(STAMP)  ## Check format, lint, types and who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

audit: $(STAMP)  ## Look up known vulnerabilities of what is installed; an error where they could not be looked up
	$(BIN)/python .ci/audit

format: $(STAMP)  ## Rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Run every benchmark, side by side with its peers
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

dist: $(STAMP)  ## Build the wheel and the source archive into dist/
	$(BIN)/python -m hatchling build -d dist

clean:  ## Delete caches and builds; runs (outputs/) and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -exec rm -rf {} +
