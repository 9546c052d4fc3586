# make PYTHON=/path/to/python3.12   uses another interpreter for .venv
# make WORKERS=4 test              runs four tests at a time; each is several processes
# make DEVCLUSTER=--accounting test-slurm   has slurmdbd and MariaDB too
# make N=5 SEED=1 chaos             does 5 runs of that seed; CHAOS_ARGS="--each" does every kind once
# make VENV=/path/to/venv           uses (or makes) an environment elsewhere, e.g. off a small home
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: help demo test test-slurm test-gpu chaos check proto clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/.installed  ## Run a small federation on this machine
	$(BIN)/python -m fedhpc.submit configs/digits.yaml --executor local --follow

test: $(VENV)/.installed-test  ## Run the tests; two at a time; no root, Slurm or GPU needed
	$(BIN)/python -m pytest --ignore=tests/slurm --ignore=tests/gpu -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slurm: $(VENV)/.installed-test  ## Run the tests on a real Slurm, made on this machine; needs root
	trap '$(BIN)/python tests/devcluster/devcluster.py down' EXIT; \
	$(BIN)/python tests/devcluster/devcluster.py up $(DEVCLUSTER) && \
	$(BIN)/python -m pytest tests/slurm $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-test  ## Run the tests on the GPU of this machine, which nobody else should use
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

chaos: $(VENV)/.installed-test  ## Run 50 federations that faults hit at random moments (half an hour)
	$(BIN)/python tests/faults/chaos.py $(if $(N),--runs $(N)) $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

check: $(VENV)/.installed-check  ## Check style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

proto:  ## Generate the messages of the link anew
	$(PYTHON) -m venv build/proto
	build/proto/bin/pip install -q grpcio-tools==1.68.1
	build/proto/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. fedhpc/federation/grid.proto

clean:  ## Remove what make made here; runs/ stays
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing fedhpc into $(VENV): torch is 5 GB, this takes a few minutes the first time"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.installed-check: pyproject.toml | $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[test,check]'
	@touch $@
