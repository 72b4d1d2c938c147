# Every command sets up what it needs in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_VENV := build/docs-venv
DOCS_STAMP := $(DOCS_VENV)/.installed
CLIENTS_VENV := build/clients-venv # others' wishes for versions are no matter of .venv
TAG ?=

.DEFAULT_GOAL := help
.PHONY: clients gpu help demo test test-all attack lint spell docs docs-serve timm-suite release-check manylinux clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## classify photographs, fine-tune on handwritten digits, draw the attention masks of both
	$(BIN)/timm-qkformer demo

# One process per core, each with one thread: tiny models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: $(STAMP) ## the tests, about 15 minutes on two cores
	$(PYTEST)

test-all: $(STAMP) ## the slow tests, too: hours
	$(PYTEST) -m ''

# One process, so that the counts are in one table.
attack: $(STAMP) ## fuzzers with fixed seeds, see docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m attack tests/attack

lint: $(STAMP) ## ruff format, ruff check, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

spell: $(STAMP) ## codespell
	$(BIN)/codespell

docs: $(DOCS_STAMP) ## the site in build/site, strictly: no dead link, no unknown name
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

docs-serve: $(DOCS_STAMP) ## the site on http://127.0.0.1:8000, built anew when a page changes
	$(DOCS_VENV)/bin/mkdocs serve

timm-suite: $(STAMP) ## timm's own tests, from its source distribution, on our models
	$(BIN)/python tests/run_timm_suite.py

release-check: ## sdist and wheel from clean, installed in an empty environment and tried; TAG=v0.2.0 compares the version
	$(PYTHON) tests/release_check.py $(TAG)

MANYLINUX := quay.io/pypa/manylinux_2_28_$(shell uname -m):2025.08.15-1

manylinux: ## in a container (docker): a wheel with its kernels for many Linux systems, in dist/, tried
	docker run --rm --volume "$(CURDIR):/source" --workdir /source $(MANYLINUX) sh tests/manylinux.sh
	$(PYTHON) tests/release_check.py dist/*-manylinux_*.whl

clients: ## other libraries on our models, slow: writes docs/compatibility.md
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet -e '.[dev,explain,export]' accelerate fastai lightning peft segmentation-models-pytorch
	OMP_NUM_THREADS=1 $(CLIENTS_VENV)/bin/python tests/run_clients.py

# Looks for a device before anything is installed.
gpu: ## on a machine with a CUDA device: its tests and benchmarks, and gpu-report.json and .md to send us
	@$(PYTHON) tests/run_gpu.py --check
	@$(MAKE) --no-print-directory $(STAMP)
	$(BIN)/python tests/run_gpu.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# The site is built from the sources alone: neither torch nor timm is installed for it.
$(DOCS_STAMP): pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python tests/docs_requirements.py | xargs -d '\n' $(DOCS_VENV)/bin/python -m pip install --quiet
	touch $@

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist output .pytest_cache .ruff_cache .mypy_cache
