# make help lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A worker that runs out of tests takes some of another's.
WORKERS ?= --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-all lint types check bench reproduce results notebooks docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready  ## make .venv and install everything into it

demo: setup  ## distil the embedded digits: teachers, distillation, evaluation, a table and a picture
	$(BIN)/python -m ftd_lightning.demo

test: setup  ## run the tests
	$(BIN)/python -m pytest $(WORKERS) -m 'not exhaustive'

test-fast: setup  ## run the tests that take no more than seconds each
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow and not exhaustive'

test-all: setup  ## run the full grids too, for an hour or more
	FTD_TEST_ALL=1 $(BIN)/python -m pytest $(WORKERS)

lint: setup  ## check style and form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## check types
	$(BIN)/mypy

check: lint types test  ## all of these

bench: setup  ## measure speed and memory beside plain loops on one thread, for up to 15 minutes
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m benchmarks.run

DATASET ?= cifar10
IPC     ?= 10
METHOD  ?= ftd

reproduce: setup  ## DATASET, IPC, METHOD [TEACHERS ITERATIONS EPOCHS STOP_AFTER ARGS]: one published cell; resumes
	$(BIN)/python -m ftd_lightning reproduce --dataset $(DATASET) --ipc $(IPC) --method $(METHOD) \
	  $(if $(TEACHERS),--teachers $(TEACHERS)) $(if $(ITERATIONS),--iterations $(ITERATIONS)) \
	  $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(STOP_AFTER),--stop-after $(STOP_AFTER)) $(ARGS)

results: setup  ## write the tables of README.md and docs/reproduction.md from notebooks/results
	$(BIN)/python docs/tools/results_table.py

notebooks: setup  ## make the notebooks from notebooks/scripts and run them
	$(BIN)/python notebooks/build.py

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# The variable silences the theme's notice of its successor.
docs: $(VENV)/.docs  ## build the site into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:  ## remove the virtual environment, the site and the demo's files
	rm -rf $(VENV) site runs/digits build dist *.egg-info
