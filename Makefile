# `make quickstart` and `make test` work on a fresh clone: they make .venv and install into it.
# Another interpreter: make quickstart PYTHON=python3.12
# On Linux a plain install of torch brings its CUDA build, several gigabytes. For the small CPU build
# give pip the CPU index named on PyTorch's install page:
#   make quickstart PIP_ARGS="--extra-index-url ADDRESS"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: quickstart test lint install clean

quickstart: $(VENV)/.installed
	@$(BIN)/fira quickstart

# Two processes, a file of tests to each at a time; the longest come first.
test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/parallel tests

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy fira

install: $(VENV)/.installed

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "there is no $(PYTHON) here; install Python 3.10 or newer, or give PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is `$(PYTHON) -V 2>&1`; FIRA needs 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing into $(VENV) (the first time takes minutes, most of them for torch)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing into $(VENV), with what the tests need"
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info
