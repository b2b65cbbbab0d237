# make check   lint, format, types, shape: in a minute
# make test    the default test suite
# On a fresh machine each target first makes .venv; Python >= 3.11, pip and a C compiler are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --durations=10

# torch's OpenMP threads spin: a second busy process would make each step 15 times slower.
export OMP_NUM_THREADS := 1

.PHONY: install check test test-slow test-browser test-faults test-network test-gpu quickstart

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_shape.py

test: $(INSTALLED)
	$(PYTEST)

# The last -m wins over the one in pyproject.toml. Exit status 5: no test has the mark.
test-slow test-browser test-faults test-network test-gpu: test-%: $(INSTALLED)
	$(PYTEST) -m $* || [ $$? -eq 5 ]

quickstart: $(INSTALLED)
	$(BIN)/vlmtune quickstart
