# `make quickstart` and `make test` start from nothing; everything they need goes into .venv.
.PHONY: quickstart setup test test-fast check bench chaos chaos-real lock render clean
SHELL := /bin/bash
BIN := .venv/bin

quickstart: setup
	$(BIN)/rlsys train configs/quickstart.yaml

setup: .venv/.ready

.venv/.ready: pyproject.toml requirements-cpu.txt launch/setup.sh
	bash launch/setup.sh

# Those that start Ray, vLLM or DeepSpeed come one by one, since each of them takes all cores.
test: test-fast
	$(BIN)/python -m pytest tests -m slow

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -n 2 --dist worksteal -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlsys benchmarks
	$(BIN)/lint-imports
	$(MAKE) test-fast

bench: setup
	$(BIN)/python -m benchmarks

# Seeded faults on simulated roles, and real signals to the processes of the quickstart.
chaos: setup
	$(BIN)/python -m rlsys.sim.chaos --schedules 500

chaos-real: setup
	$(BIN)/python -m benchmarks.chaos_real

# Resolve the dependencies anew (after a change of pyproject.toml).
lock: setup
	bash launch/lock.sh

# Manifests and scripts of clusters (after a change of launch/values*.yaml).
render: setup
	$(BIN)/python launch/render.py launch/values.yaml --out launch/rendered/gpu
	$(BIN)/python launch/render.py launch/values-cpu.yaml --out launch/rendered/cpu

clean:
	rm -rf .venv runs cache
