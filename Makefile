# `make demo` and `make test` are the two commands; everything they need is set up by scripts that skip what is there.
SHELL := /bin/bash
BIN := .venv/bin
# Reading a frozen process's memory, and mounting for it, take root.
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E)
PYTEST := $(BIN)/python -m pytest
CHECKED := src tests scripts $(wildcard bench)

.PHONY: help setup image check test test-all test-quick shake demo bench stubs openapi lock clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## system packages (apt) and the virtual environment; skips what is there
	@scripts/setup

image: setup ## the default image for tests, in .cache/images
	@$(ROOT) $(BIN)/python scripts/test_image.py

check: ## formatting, lint, types, import walls, generated code, lock
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/lint-imports
	scripts/check_stubs
	$(BIN)/python scripts/check_lock.py

test: setup image ## every test, with real machines
	$(ROOT) scripts/test

test-all: setup image ## make test, and what that leaves out because it takes long
	$(ROOT) env FORKY_TEST_LONG=1 scripts/test

test-quick: ## unit and component tests alone: no machines, no root
	$(PYTEST) tests/unit tests/component

shake: setup ## the component tests with tasks that take steps late, by many ways: finds races
	for late in 0.02:100 0.1:40 0.3:10; do FORKY_TEST_SHAKE=$$late $(PYTEST) tests/component || exit; done

demo: setup ## forks a running machine into 8 children and shows what happened
	@$(ROOT) $(BIN)/python scripts/demo.py

bench: setup ## the benchmarks, into bench/results
	$(ROOT) $(BIN)/python -m bench

stubs: ## generate src/forkypig/v1 from proto/
	scripts/stubs src

openapi: ## write docs/openapi.json from the REST API
	$(BIN)/python scripts/openapi.py

lock: ## resolve requirements.txt anew from pyproject.toml (needs a network)
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-header --extra dev -p 3.11 \
	  pyproject.toml -o requirements.txt

clean: ## remove what was made here: virtual environment, caches, the test image
	$(ROOT) rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec $(ROOT) rm -rf {} +
