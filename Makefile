# `make quickstart` and `make test` start from nothing; everything they need goes into .venv.
.PHONY: quickstart setup test test-fast check bench lock clean
SHELL := /bin/bash
BIN := .venv/bin

quickstart: setup
	$(BIN)/rlsys train configs/quickstart.yaml

setup: .venv/.ready

.venv/.ready: pyproject.toml requirements-cpu.txt launch/setup.sh
	bash launch/setup.sh

test: setup
	$(BIN)/python -m pytest tests

test-fast: setup
	$(BIN)/python -m pytest tests -m "not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlsys
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests -m "not slow" -q

bench: setup
	$(BIN)/python -m rlsys.sim

# Resolve the dependencies anew (after a change of pyproject.toml).
lock: setup
	bash launch/lock.sh

clean:
	rm -rf .venv runs cache
