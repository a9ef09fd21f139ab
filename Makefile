# SPDX-License-Identifier: Apache-2.0
# Every target works in a fresh clone: it makes the virtual environment first if there is none.

# The first Python on the path that is new enough, looked for once and only when needed; `make … PYTHON=…` names another.
NEW_ENOUGH := import sys; print("yes" if sys.version_info >= (3, 11) else "")
PYTHON ?= $(eval PYTHON := $(shell for name in python3.11 python3.12 python3.13 python3; do \
	if test "`$$name -c '$(NEW_ENOUGH)' 2>/dev/null`" = yes; then echo $$name; exit; fi; done; echo python3))$(PYTHON)
VENV ?= .venv
EXTRAS ?= demo,mediapipe,dev

BIN := $(VENV)/bin
comma := ,
STAMP := $(VENV)/.affect-$(subst $(comma),-,$(EXTRAS))

.PHONY: help setup train test lint format benchmark
.DEFAULT_GOAL := help

help:
	@echo "make setup      the virtual environment $(VENV), with everything that was tested together"
	@echo "make train      learn from real faces: affect train experiment=first_run"
	@echo "make test       the tests"
	@echo "make lint       style and types"
	@echo "make format     put the style right"
	@echo "make benchmark  step, loader and built-in faces against plain references"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test "`$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null`" = yes || { \
		echo "affect needs Python 3.11 or newer, and $(PYTHON) is: `$(PYTHON) --version 2>&1`"; \
		echo "Install one and name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) could not make a virtual environment. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (some minutes and gigabytes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

train: $(STAMP)
	$(BIN)/affect train experiment=first_run

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell affect conf docs examples README.md CHANGELOG.md CONTRIBUTING.md
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP)
	$(BIN)/affect benchmark step
	$(BIN)/affect benchmark loader
	$(BIN)/affect benchmark faces
