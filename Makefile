# make check   lint, format, types, shape: in a minute
# make test    the default test suite
# On a fresh machine each target first makes .venv; Python >= 3.11, pip and a C compiler are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEEPSPEED := .venv-deepspeed
INSTALLED_DEEPSPEED := $(DEEPSPEED)/.installed
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'
PYTEST := $(BIN)/python -m pytest --durations=10

# torch's OpenMP threads spin: a second busy process would make each step 15 times slower.
# The quickstart is alone, and takes the cores that there are.
check test test-slow test-browser test-faults test-network test-gpu test-deepspeed: \
  export OMP_NUM_THREADS := 1

.PHONY: install check test test-slow test-browser test-faults test-network test-gpu test-deepspeed quickstart

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

# DeepSpeed, in an environment of its own over the other one: transformers and accelerate would
# import it behind everybody's back.
test-deepspeed: $(INSTALLED_DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pytest --durations=10 -m 'slow or not slow' tests/distributed/test_zero.py

$(INSTALLED_DEEPSPEED): constraints.txt $(INSTALLED)
	$(BIN)/python -m venv $(DEEPSPEED)
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE))')" \
	  > "$$($(DEEPSPEED)/bin/python -c $(SITE))/base.pth"
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt deepspeed
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/vlmtune quickstart
