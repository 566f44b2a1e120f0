# The project's two commands are `make run` and `make test`. Everything lives in .venv, beside this file.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

export PIP_ROOT_USER_ACTION := ignore

.PHONY: run test lint types check battery oracle bench clean

# Installs kvm2 and runs the demonstration guest on a described host.
run: $(VENV)/.installed
	@$(BIN)/kvm2 run

# Style, types, generated files, tests with doctests and the examples of the documentation.
test: lint types check

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developed
	$(BIN)/mypy

check: $(VENV)/.developed
	$(BIN)/python -m pytest

# The long batteries: the published records with the recorded patience, long random tests.
battery: $(VENV)/.developed
	$(BIN)/python -m pytest -m slow

# Live arm64 kernels in QEMU, every shape: creation, guests, published answers, models that a probe makes, the catalogue.
oracle: $(VENV)/.developed
	$(BIN)/python -m pytest -m "slow or not slow" tests/lab/oracle tests/lab/test_live.py

# The figures and their goals.
bench: $(VENV)/.developed
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "kvm2 needs Python 3.11 or newer, and $(PYTHON) is older or missing: make PYTHON=python3.12 run" >&2; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 3; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	@echo "installing kvm2 into $(VENV)" >&2
	@$(PIP) --editable .
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	@echo "installing the development tools into $(VENV)" >&2
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"])' \
	    | xargs $(PIP)
	@touch $@
