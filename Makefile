# `make test` sets itself up on a fresh machine: a virtual environment beside this file, made anew when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ROUNDS ?= 20
SEED ?= 1
IMAGES ?= 2000
FOLDER ?= /tmp/fcos_ray-history
SLOW := s3 or ray or chaos or gpu

.PHONY: help install demo test test-fast lint chaos bench readme clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(INSTALLED)  ## the virtual environment with everything

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install  ## the whole way on 120 drawn images, offline; leaves out/demo/
	$(BIN)/python jobs/demo.py

test: test-fast  ## every test that this machine can run: pure, then S3 server, Ray, kills
	$(BIN)/python -m pytest -m "$(SLOW)"

# A file's tests stay in one process, and torch has one thread in each: 12.0 -> 6.6 minutes on 2 cores
test-fast: install  ## the pure tests, in as many processes as CPUs, eight at most: some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ($(SLOW))" -n auto --maxprocesses 8 --dist loadfile

chaos: install  ## kills, stops, a failing store, an outage of two minutes: an hour or more. ROUNDS=20 SEED=1 IMAGES=2000
	$(BIN)/python -m tests.chaos.harness --rounds $(ROUNDS) --seed $(SEED)
	CHAOS_IMAGES=$(IMAGES) FCOS_RAY_MUTATED_IMAGES=20000 $(BIN)/python -m pytest -rP tests/chaos tests/inputs/test_mutated_images.py

bench: install  ## speed against what people write (hours), and a night's plan against 100 million images (FOLDER keeps 6 GB)
	$(BIN)/python -m tests.benchmarks.postprocess_speed
	$(BIN)/python -m tests.benchmarks.load_speed
	$(BIN)/python -m tests.benchmarks.no_model
	$(BIN)/python -m tests.benchmarks.plan_speed
	$(BIN)/python -m tests.benchmarks.plan_history --folder $(FOLDER)
	$(BIN)/pip install --quiet --editable '.[dev,peers]'
	$(BIN)/python -m tests.benchmarks.peers --images 400 --others 100

readme: install  ## the README's settings table, from the definition
	$(BIN)/python tests/test_readme.py

lint: install  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
