PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint fmt

# torch goes first, by name and exact version: every other package then finds it installed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/chorus run recipes/demo.yaml

# Two at a time, with one thread each (see tests/conftest.py); plain `.venv/bin/pytest` runs one after another.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadscope --no-loadscope-reorder

# By hand, on a machine that does nothing else; CASES="ticks memory" for some of them.
bench: .venv/installed
	$(BIN)/python -m tests.bench $(CASES)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

fmt: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
