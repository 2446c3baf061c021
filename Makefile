PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# what .github/workflows/test.yml tries
PYTHONS := 3.11 to 3.13
CHECK_PYTHON = version=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null \
	|| echo 'not there'); case $$version in 3.1[1-3].*) ;; \
	*) echo "legrad needs Python $(PYTHONS); $(PYTHON) is $$version; run make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; false;; esac

# two processes of one thread each: the tests of a unit use little of a second core
UNITS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/integration --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help

.PHONY: help setup demo test test-fast test-all check fix figures bench bench-gpu bench-pipeline demo-model train-demo clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml configs/constraints.txt
	@test -x $(BIN)/pip || { $(CHECK_PYTHON) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint configs/constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP)  ## make .venv and install, where something changed

demo: $(STAMP)  ## annotate the shipped shards with the shipped model, evaluate, draw
	$(BIN)/legrad demo

test: $(STAMP)  ## all tests but the slow ones: units in two processes, then whole jobs on Ray
	$(UNITS) -m "not slow"
	$(BIN)/python -m pytest tests/integration -m "not slow"

test-fast: $(STAMP)  ## unit tests that take milliseconds, for while you work
	$(UNITS) -m "not slow and not medium"

test-all: $(STAMP)  ## all tests
	$(UNITS)
	$(BIN)/python -m pytest tests/integration

check: $(STAMP)  ## format, lint, imports and types, nothing changed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

fix: $(STAMP)  ## format, mend what the linter can, renew the list of keys in configs/README.md
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/python -m pipeline.config.reference configs/README.md

bench: $(STAMP)  ## explaining on the CPU beside the authors' package and a forward pass: half an hour or more, a JSON row each
	$(BIN)/python tests/bench/explain.py

bench-gpu: $(STAMP)  ## explaining on a CUDA device beside a forward pass, the kernel beside its fallback
	$(BIN)/python tests/bench/explain_gpu.py
	$(BIN)/python tests/bench/gpu_step.py

bench-pipeline: $(STAMP)  ## benchmarks of the pipeline: a worker without its device, processes, throughput, memory, driver; a JSON row each
	$(BIN)/python tests/bench/host_ceiling.py
	$(BIN)/python tests/bench/process_costs.py
	$(BIN)/python tests/bench/annotate_throughput.py
	$(BIN)/python tests/bench/memory_by_shard_size.py
	$(BIN)/python tests/bench/driver_overhead.py
	$(BIN)/python tests/bench/cluster_simulation.py
	$(BIN)/python tests/bench/driver_simulated_workers.py

figures: $(STAMP)  ## list the published figures that are older than what they measure; RUN=NAME measures one again
	$(BIN)/python tests/bench/figures.py $(if $(RUN),--run $(RUN))

demo-model: $(STAMP)  ## train the demo model and render its shards again (needs npm; see pipeline/demo/README.md)
	$(BIN)/python -m pip install --quiet --constraint configs/constraints.txt --editable '.[train-demo-model]'
	$(BIN)/python -m pipeline.demo.making.train
	$(BIN)/python -m pipeline.demo.making.make_shards

train-demo: $(STAMP)  ## train a segmenter on the demo's pseudo-masks, beside one on ground truth
	$(BIN)/python -m pipeline.demo.making.train_segmenter

clean:  ## remove what was built or written here
	rm -rf $(VENV) out .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
