# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop

.PHONY: demo test check docs interop durability bench clean

demo: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh fixtures/demo.sh build/demo

test: $(VENV)/.developing
	$(BIN)/python -m pytest

check: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

# The pages and pictures that scripts make of the program; tests hold them to what these make.
docs: $(VENV)/.developing
	@for script in docs/generate/*.py; do \
		grep -q __main__ "$$script" || continue; \
		echo "$$script"; $(BIN)/python "$$script" || exit 1; \
	done

interop: $(INTEROP)/.installed
	$(INTEROP)/bin/python -m pytest --tb=short interop

# Faults at every system call. As root on Linux, with strace, e2fsprogs and xfsprogs.
durability: $(VENV)/.developing
	$(BIN)/python -m durability $(DURABILITY)

bench: $(VENV)/.developing
	$(BIN)/python -m bench --dir build/bench $(BENCH)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ema-avg needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.developing: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# With TensorFlow, which the project does without: beside it as in an evaluation's environment.
$(INTEROP)/.installed: pyproject.toml interop/requirements.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement interop/requirements.txt --editable .
	@touch $@

clean:
	rm -rf build $(VENV) $(INTEROP) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
