.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help: ## print this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

run: $(VENV)/.run ## set up what is missing and start the server
	@exec $(BIN)/python -m server

test: $(VENV)/.dev ## the whole test suite
	@$(BIN)/python -m pytest -n 4 --dist worksteal $(TESTS)

lint: $(VENV)/.dev ## format, style, types, and who imports whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m server.i18n check

phone-image: $(VENV)/.run ## build the simulated phone's container image and load it into the Docker engine
	@$(BIN)/python -m phones.image

bench: $(VENV)/.dev ## measure speed and memory; prints a table
	@$(BIN)/python -m benchmarks.api

translations: $(VENV)/.dev ## bring locales/ up to date with the texts in the code
	@$(BIN)/python -m server.i18n extract

lock: $(VENV)/.dev ## pin the newest versions that pyproject.toml allows
	@$(BIN)/pip install -q pip-tools
	@$(BIN)/pip-compile -q -U $(LOCK) -o requirements.lock pyproject.toml
	@$(BIN)/pip-compile -q -U $(LOCK) --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml
LOCK := --generate-hashes --strip-extras --no-emit-index-url --no-emit-options --no-header --no-annotate --allow-unsafe

clean: ## remove what was built; keeps data/
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Cloudphone needs Python 3.11 or newer: install python3.11 and run 'make PYTHON=python3.11 run'"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing: run 'sudo apt-get install python3-venv'"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made requirements.lock
	@echo "Installing what the server needs into $(VENV) (about a minute, once) ..."
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.lock
	@echo "Installing the test tools ..."
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

.PHONY: help run test lint phone-image bench translations lock clean
