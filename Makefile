# Each target does all its own set-up. Variables:
#   PYTHON       a Python 3.11 or 3.12            (default: the first of python3.12, python3.11, python3 that is one)
#   VENV         where the environment lives      (default: .venv)
#   PIP_ARGS     more words for pip install       (for example --no-deps)
#   CONSTRAINTS  exact versions                   (default: constraints.txt; empty for none)
#   TORCH_INDEX  where torch and torchvision come from; without a GPU
#                TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes
VENV ?= .venv
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

export VENV PIP_ARGS CONSTRAINTS TORCH_INDEX PYTHON

.PHONY: help install quickstart test test-full test-slurm soak check format clean

help:
	@echo "make install     the environment in $(VENV), once"
	@echo "make quickstart  train on handwritten digits, two processes, under two minutes"
	@echo "make test        the tests that need neither GPU nor Slurm"
	@echo "make test-full   the same and the slow ones"
	@echo "make test-slurm  jobs on a real Slurm of four virtual nodes; root on a Debian, installs Slurm's packages"
	@echo "make soak        hundreds of kills; takes hours"
	@echo "make check       format, lint, types, import direction"
	@echo "make format      format the code"
	@echo "make clean       remove runs/ and data/; the environment is removed by rm -r $(VENV)"

install:
	@launch/install.sh

quickstart: install
	@launch/quickstart.sh

test: install
	$(PYTEST) -m "not (gpu or multigpu or slow or soak or slurm)"

test-full: install
	$(PYTEST) -m "not (gpu or multigpu or soak or slurm)"

test-slurm: install
	$(PYTEST) -m "slurm and not slow" tests/slurm

soak: install
	$(PYTEST) --timeout=0 -m soak

check: install
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(PYTEST) -q tests/test_architecture.py

format: install
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf runs data
