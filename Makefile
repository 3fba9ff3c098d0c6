# make quickstart   an environment, seprune, and the main job on the digits that ship with it
# make test         an environment, seprune with its development tools, and the tests
#
# PYTHON names the interpreter to build the environment with, VENV where it goes.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done)
BIN := $(VENV)/bin

.DEFAULT_GOAL := quickstart
.DELETE_ON_ERROR:
.PHONY: quickstart test check clean

quickstart: $(VENV)/installed
	$(BIN)/python -m seprune run recipes/quickstart.yaml --out runs/quickstart

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Editable, so the stamps depend on what is installed beside seprune, not on seprune itself.
$(VENV)/installed: pyproject.toml | $(VENV)/made
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/made
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@ $(VENV)/installed

# An environment that works is left as it is; one that was cut short is made anew.
$(VENV)/made:
	@test -n "$(PYTHON)" || { \
		echo "seprune needs Python 3.11 or newer, and none was found." >&2; \
		echo "next: install one and say where it is: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: it has no venv or no ensurepip." >&2; \
		echo "next: on Debian or Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null || \
		$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) runs dist
