.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv from PATH; else one that pip puts into .uv, so that nothing outside this folder changes
UV := $(shell command -v uv 2>/dev/null || echo PYTHONPATH=.uv $(PYTHON) -m uv)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.uv:
	@command -v uv >/dev/null 2>&1 || test -d .uv/uv || $(PYTHON) -m pip install --quiet --target .uv uv

$(BIN)/python: | .uv
	$(UV) venv --quiet --python $(PYTHON) $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	$(UV) pip install --quiet --python $(BIN)/python -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(UV) pip install --quiet --python $(BIN)/python -r requirements-dev.lock
	@touch $@

install: $(VENV)/.installed ## Make .venv with the pinned versions

demo: $(VENV)/.installed ## Train, measure, merge: a real antibody model learns mouse (2 minutes, no network)
	$(BIN)/peft-mlm demo

test: $(VENV)/.installed-dev ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.installed-dev ## Time training and preprocessing against run_mlm + peft (15 minutes)
	$(BIN)/python benchmarks/against_run_mlm.py --steps 5

bench-gpu: $(VENV)/.installed-dev ## The same on a CUDA GPU, in bf16 and 4 bits (20 minutes)
	$(BIN)/python benchmarks/on_gpu.py

support: $(VENV)/.installed-dev ## Run every model type and every method, and write docs/support.md (10 minutes)
	$(BIN)/python scripts/build_support_table.py

merging: $(VENV)/.installed-dev ## Merge every method on every kind of base, and write docs/merging.md (8 minutes)
	$(BIN)/python scripts/build_merging_table.py

bench-merge: $(VENV)/.installed-dev ## Time and weigh a merge file by file against cp and PEFT (8 minutes, 13 GB of disk)
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python scripts/build_merging_table.py --speed_only

quality: $(VENV)/.installed-dev ## Lint, format check, types, layers, docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint --quiet peft_mlm

lock: | .uv ## Pin the newest versions that pyproject.toml allows
	$(UV) pip compile --upgrade --universal --python-version 3.11 --no-header --no-annotate --quiet pyproject.toml -o requirements.lock
	$(UV) pip compile --upgrade --universal --python-version 3.11 --no-header --no-annotate --quiet pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock

.PHONY: help install demo test bench bench-gpu support merging bench-merge quality lock
