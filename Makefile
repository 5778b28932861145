# make train    set up .venv and train a small model on real text    ARGS="--mesh tp=2 --name other" goes to `pypar train`
# make test     set up .venv and run the tests                      ARGS="-k attention" reaches pytest
# make test-all the same with the long ones; WORKERS=1 runs one test at a time, as a debugger wants it
# make lint; make bench (BENCH=attention); make clean
# make docs     build the pages of docs/ with the API reference into build/docs
# make gpu-report what the compiled GPU kernels promise: registers, spills, occupancy, tensor-core share; needs nvcc and triton
#
# PYTHON=python3.12 chooses the Python that .venv is made of; CONSTRAINTS= lets pip choose every version.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BENCH ?= *
# Three tests at a time, for two cores: most are one process with one thread, those of several ranks wait for each other.
WORKERS ?= 3
ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
COMPILERS := $(if $(filter default,$(origin CXX)),g++ clang++ c++,$(firstword $(CXX)))
# Tests start some hundred processes, each of which would compile the package anew where Python may keep nothing.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
# worksteal: neighbours in a file, which share what a fixture made, mostly stay with one worker.
PYTEST_ARGS := -q $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)
BUILD_INPUTS := pyproject.toml setup.py $(CONSTRAINTS) $(shell find csrc -type f)

.PHONY: train test test-all lint bench docs gpu-report clean
.DELETE_ON_ERROR:

train: .venv/.set-up
	$(BIN)/pypar train $(or $(ARGS),--mesh dp=2 --overwrite)

test: .venv/.set-up-dev
	$(PYTEST) $(PYTEST_ARGS) -m "not slow" $(ARGS)

test-all: .venv/.set-up-dev
	$(PYTEST) $(PYTEST_ARGS) $(ARGS)

lint: .venv/.set-up-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
	$(BIN)/mypy

bench: .venv/.set-up-dev
	set -e; for program in bench/$(BENCH).py; do $(BIN)/python $$program $(ARGS); done

docs: .venv/.set-up-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu-report: .venv/.set-up-dev
	$(BIN)/python bench/gpu_report.py $(ARGS)

clean:
	rm -rf build dist *.egg-info pypar/_native*.so pypar/_cuda*.so .venv/.set-up* .pytest_cache .mypy_cache .ruff_cache
	find pypar kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# What the user runs, and, apart, what tests and lint need besides.
.venv/.set-up: .venv/.python $(BUILD_INPUTS)
	$(INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e .
	touch $@

.venv/.set-up-dev: .venv/.python $(BUILD_INPUTS)
	$(INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[test,lint]'
	touch .venv/.set-up $@

.venv/.set-up-docs: .venv/.python $(BUILD_INPUTS)
	$(INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[docs]'
	touch .venv/.set-up $@

# One line per thing that a bare machine may lack, before anything is downloaded.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "pypar needs Python >= 3.10, $(PYTHON) is not: install one (Debian: apt install python3) or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make a virtual environment: install ensurepip and venv (Debian: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) lacks Python.h: install its headers (Debian: apt install python3-dev)"; exit 1; }
	@for compiler in $(COMPILERS); do command -v $$compiler >/dev/null && exit 0; done; \
	  echo "no C++ compiler among: $(COMPILERS); install one (Debian: apt install g++) or say make CXX=..."; exit 1
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	touch $@
