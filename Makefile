# make demo, make test: both set up .venv first; all else is for those who work on the project.
PYTHON ?= python3
BIN := .venv/bin
# the tests are many and small: a process for each core, one thread in each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test slow lint setup

demo: .venv/ready
	$(BIN)/firstsight demo

test: .venv/ready
	$(PYTEST)

slow: .venv/ready
	$(PYTEST) -m slow

lint: .venv/ready
	$(BIN)/ruff check firstsight tests benchmarks
	$(BIN)/ruff format --check firstsight tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "firstsight needs Python 3.10 or newer; use make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
