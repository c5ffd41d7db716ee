# `make repro` makes every result; `make test` runs the tests. Both set up what they need the first time.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test lint benchmarks clean

repro: $(VENV)/.installed .dvc/config.local
ifdef JOBS
	@python -c "import ray" 2>/dev/null || python -m pip install --quiet --disable-pip-version-check -r requirements-cluster.txt
	python -m stages.sweep --jobs $(JOBS)
else
	dvc repro
endif
	@python -m stages.show

# DVC wants a git clone; a downloaded archive does as well once it is told
.dvc/config.local: | $(VENV)/.installed
	@if git rev-parse --git-dir >/dev/null 2>&1; then touch $@; else $(BIN)/dvc config --local core.no_scm true; fi

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
