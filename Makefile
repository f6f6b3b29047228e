# Every target works as the first command typed on a fresh machine: it makes .venv and installs into it when needed.
#   make demo     train a small model over two pipeline stages, evaluate it, generate a sample (a few minutes)
#   make test     all tests; `make test TESTS=tests/test_recipe_load.py` runs some of them
#   make lint     ruff and mypy        make format   rewrite the sources in the project's format
#   make models   check every architecture that transformers registers; writes docs/models.md (about five minutes)
#   make bench    llmpipe beside other pipeline engines on two cores; writes docs/benchmarks.md (at most 14 minutes;
#                 in pieces: make bench BENCH="--sections main", then BENCH="--resume --output docs/benchmarks.md")
#   make clean    remove .venv, caches and build outputs, never a run
# PYTHON chooses the interpreter .venv is made with (3.11 or newer). Which build of torch comes is pip's configuration.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TESTS ?= tests
BENCH ?= --output docs/benchmarks.md

.PHONY: help install demo test lint format bench models clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,8s/^# *//p' Makefile

install: $(INSTALLED)

# The stamp is written last, so that an interrupted installation is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: name a newer one, for example make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/llmpipe train recipes/demo.yaml
	$(BIN)/llmpipe evaluate recipes/demo.yaml
	$(BIN)/llmpipe generate demo --prompt "def __init__(self" --max-new-tokens 64

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/compare.py $(BENCH)

models: $(INSTALLED)
	$(BIN)/python benchmarks/models.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
