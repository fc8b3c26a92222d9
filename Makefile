# Everything works from nothing but Python and pip: the first target sets up .venv and installs what is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA card the CPU build of torch is enough, and saves gigabytes of CUDA packages.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo "torch" || echo "torch==2.13.0")

.PHONY: demo test lint types slow gpu faults clean

demo: $(VENV)/run.ok
	$(BIN)/qlora demo --out demo-run

test: $(VENV)/dev.ok
	$(BIN)/python -m pytest

slow: $(VENV)/dev.ok
	$(BIN)/python -m pytest -m slow

# What only a card can show, in parts of under nine minutes; results that are there are skipped.
gpu: $(VENV)/dev.ok
	$(BIN)/python benchmarks/gpu.py

# Kills, signals, poison, flips, attacks and mutants at full size: about an hour on two cores.
faults: $(VENV)/dev.ok
	PYTHONPATH=.:tests $(BIN)/python benchmarks/fault_peers.py
	PYTHONPATH=.:tests $(BIN)/python benchmarks/faults.py

lint: $(VENV)/dev.ok
	$(BIN)/ruff check .

types: $(VENV)/dev.ok
	$(BIN)/mypy

$(VENV)/run.ok: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/dev.ok: $(VENV)/run.ok
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-run build *.egg-info
