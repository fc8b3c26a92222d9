# Everything works from nothing but Python and pip: the first target sets up .venv and installs what is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA card the CPU build of torch is enough, and saves gigabytes of CUDA packages.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo "torch" || echo "torch==2.13.0")

.PHONY: demo test lint types lowest slow gpu faults clean

demo: $(VENV)/run.ok
	$(BIN)/qlora demo --out demo-run

# Several processes import the same files: they compile them once.
test slow: export PYTHONDONTWRITEBYTECODE =

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

# A smoke test with the lowest versions that pyproject.toml allows, and without the modules of POSIX. torch is the CPU build: its lowest one has none.
LOWEST := .venv-lowest
lowest: $(LOWEST)/run.ok
	$(LOWEST)/bin/python -m pytest -n 0 -m "slow or not slow" -p no:cacheprovider tests/model/test_quantized_cache.py \
	    tests/memory/test_activation_recompute.py tests/exporters/test_export_run.py tests/utils/test_platforms.py

$(LOWEST)/run.ok: pyproject.toml scripts/lowest_versions.py
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) scripts/lowest_versions.py torch > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOWEST)/requirements.txt \
	    pytest pytest-xdist hypothesis
	touch $@

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
	rm -rf $(VENV) $(LOWEST) demo-run build *.egg-info
