# `make quickstart` and `make test` work on a fresh clone: they make .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
# Extra words for pip, such as --index-url or --extra-index-url to take a CPU build of torch.
PIP_ARGS ?=
BIN = $(VENV)/bin

.PHONY: quickstart test lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/fira quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/mypy fira

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
