# `make repro` makes every result; `make test` runs the tests. Both set up what they need the first time.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test lint benchmarks clean

repro: $(VENV)/.installed .dvc/config
	dvc repro
	@python -m stages.report --print

test: $(VENV)/.installed-dev
	python -m pytest -n 2

lint: $(VENV)/.installed-dev
	ruff check .
	ruff format --check .
	mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

clean:  ## what can be made again: decoded pixels, checkpoints, logs
	rm -rf scratch logs
