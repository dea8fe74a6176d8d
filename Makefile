# Everything runs in .venv, which `make` builds from pyproject.toml with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
RECIPE ?= pipelines/recipes/digits.yaml
# by its path: a script beside a clone of the same name would find that folder first
EDITABLE := --config-settings editable_mode=compat --editable

.PHONY: demo test test-all lint format bench clean

demo: .venv/installed  ## distil scikit-learn's digits: runs/digits/report.html
	$(BIN)/teddy-ray distill $(RECIPE)

test: .venv/installed-dev  ## what CI runs; about a quarter of an hour on two cores
	$(BIN)/pytest

test-all: .venv/installed-dev  ## with every fault in every stage
	$(BIN)/pytest -m "slow or not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed-dev  ## prints ratios; tests/benchmarks/RESULTS.md keeps them, and names those run by hand
	$(BIN)/python tests/benchmarks/bench_synthesis.py
	$(BIN)/python tests/benchmarks/bench_dispatch.py
	$(BIN)/python tests/benchmarks/bench_statistics.py

clean:  ## the environment; never artifacts/ or runs/
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, not {sys.version.split()[0]}; make PYTHON=..."'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv: two to three minutes, 6.5 GB (PyTorch's default build brings its CUDA libraries)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(EDITABLE) .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(EDITABLE) '.[dev]'
	touch $@
