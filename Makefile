# The tasks of this project. `make` lists them. Each makes the environment it needs in .venv, once.
#
#   PYTHON=/usr/bin/python3.12   the interpreter .venv is made from (3.11 or later); `make clean` first to change it
#   VENV=/tmp/elsewhere          where the environment goes
#   ARGS="tests/unit -k fifo"    passed on to pytest (test, test-all, coverage), to the benchmark (bench) or to the demo

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

# Why: when the interpreter of the environment is gone (upgraded, moved), what was installed for it has to be installed again.
$(shell test -x "$(BIN)/python" || rm -f "$(VENV)"/.installed*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all coverage lint format types bench bench-queue browser servers clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## survey the standard library's sources with two pools (needs psutil alone)
	$(BIN)/bulkhead demo $(ARGS)

test: $(VENV)/.installed-dev browser servers ## run the tests, without those marked slow
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not slow and not alone"
	$(BIN)/python -m pytest -m "not slow and alone"
else
	$(BIN)/python -m pytest $(ARGS)
endif

test-all: $(VENV)/.installed-dev browser servers ## run all tests, the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

coverage: $(VENV)/.installed-dev browser servers ## run the tests and list the lines that none reached, workers included
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

lint: $(VENV)/.installed-dev ## check format, lint rules and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## rewrite the sources as lint wants them, where a tool can
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

types: $(VENV)/.installed-dev ## check the types of src with mypy --strict
	$(BIN)/mypy

bench: $(VENV)/.installed-bench ## compare with other process pools: a table, and the same as JSON and as a chart
	$(BIN)/python benchmarks/bench.py $(or $(ARGS),--json benchmarks/figures.json --png benchmarks/chart.png)

bench-queue: $(VENV)/.installed-bench-queue ## compare the durable queue with others, on a Redis of its own
	$(BIN)/python benchmarks/bench_queue.py $(or $(ARGS),--json benchmarks/queue_figures.json --png benchmarks/queue_chart.png)

# Quick where they are. Tests find them on the path.
browser:
	@sh tools/browser.sh

servers:
	@sh tools/servers.sh

clean: ## remove .venv, caches and build output
	test ! -f "$(VENV)/pyvenv.cfg" || rm -rf "$(VENV)"
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	sh tools/venv.sh "$(PYTHON)" "$(VENV)"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing bulkhead and psutil into $(VENV)"
	@$(PIP) -e .
	@touch $@

# A development environment is a fit one for the demo too, so both stamps are set.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing bulkhead and its development tools into $(VENV)"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml | $(BIN)/python
	@echo "installing bulkhead and the pools it is compared with into $(VENV)"
	@$(PIP) -e ".[bench,closures]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench-queue: pyproject.toml | $(BIN)/python
	@echo "installing bulkhead and the queues it is compared with into $(VENV)"
	@$(PIP) -e ".[queue,redis,nats,bench-queue]"
	@touch $@
