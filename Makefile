# `make repro` makes every result; `make test` runs the tests. Both set up what they need the first time.

# macOS ships GNU make 3.81, which finds `python` in the PATH below only where a shell of our choice runs the line
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# the first of these that is recent enough; 3.11 made the committed results
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python
FIND_PYTHON = for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo "$$python" && break; done
NO_PYTHON = Python 3.11 or later with venv is needed, and $(if $(PYTHON),$(PYTHON) is not,none of $(PYTHONS) is): \
	install it (on Debian python3-venv too), or name one, as in make PYTHON=/usr/local/bin/python3.12

# two installations at a time would meet in one environment
.NOTPARALLEL:
.PHONY: help repro report gpu-check test lint clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=... names the Python to set up with, the first time"

repro: $(VENV)/.installed .dvc/config.local  ## what is out of date is trained, then the tables; JOBS=2: at most two at a time
	python -m stages.sweep $(if $(JOBS),--jobs $(JOBS))
	@python -m stages.show

report: $(VENV)/.installed .dvc/config.local  ## tables, curves and pages again from results/ alone: no data, no models, no training
	dvc repro --single-item --force tables table4 curves trials studies report metrics

# DVC wants a git clone; a downloaded archive does as well once it is told
.dvc/config.local: | $(VENV)/.installed
	@if git rev-parse --git-dir >/dev/null 2>&1; then touch $@; else $(BIN)/python -m dvc config --local core.no_scm true; fi

gpu-check:  ## all that only a GPU can show, in ten minutes; needs little but torch, PARTS="numbers step" chooses
	@python=$$(command -v $(BIN)/python || command -v python3 || command -v python); \
	$$python -m benchmarks.gpu_check $(if $(PARTS),--parts $(PARTS))

test: $(VENV)/.installed-dev  ## the test suite
	python -m pytest -n 2

lint: $(VENV)/.installed-dev  ## style, types, and what may import what
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

# an environment whose Python has gone is made anew
$(shell test -e $(BIN)/python || rm -f $(VENV)/.installed*)

$(BIN)/python:
	"$(or $(shell $(FIND_PYTHON)),$(error $(NO_PYTHON)))" -m venv --clear $(VENV)

# pip shows what it fetches; after an interruption it goes on from what is in its cache
define install
@echo "Installing $(1) into $(VENV): some minutes; 8 GB on Linux, mostly CUDA (README says how to do without it)"
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
$(BIN)/python -m pip install --disable-pip-version-check -r $(1)
endef

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(call install,requirements.txt)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-cluster.txt requirements.txt | $(BIN)/python
	$(call install,requirements-dev.txt)
	@touch $@ $(VENV)/.installed

clean:  ## decoded pixels, checkpoints and logs are removed; they can be made again
	rm -rf scratch logs
