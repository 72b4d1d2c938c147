# Both commands set up everything they need in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all attack lint timm-suite clean

demo: $(STAMP)
	$(BIN)/timm-qkformer demo

# One process per core, each with one thread: tiny models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m ''

# Fuzzers with fixed seeds, see docs/reliability.md. One process, so that the counts are in one table.
attack: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m attack tests/attack

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# timm's own tests, from its source distribution, on our models.
timm-suite: $(STAMP)
	$(BIN)/python tests/run_timm_suite.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist output .pytest_cache .ruff_cache .mypy_cache
