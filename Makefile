# Every target sets up what it needs: a virtual environment in .venv, the package and its tools.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test lint bench clean

# The stamp is touched last, so that an installation which was cut off is made again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.10,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

quickstart: $(VENV)/.installed  ## the whole method on a laptop
	$(BIN)/selfguide run configs/quickstart.yaml

test: $(VENV)/.installed lint  ## all tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed  ## the benchmarks that this machine can run
	$(BIN)/python jobs/benchmark.py loading --json build/loading.json
	$(BIN)/python jobs/benchmark.py generation --json build/generation.json
	$(BIN)/python jobs/benchmark.py novelty --json build/novelty.json
	$(BIN)/python jobs/benchmark.py filters --json build/filters.json
	$(BIN)/python jobs/benchmark.py training --json build/training.json

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache
