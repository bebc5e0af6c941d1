# Everything a contributor runs. `make demo` and `make test` work in a fresh clone.

SHELL := bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
DEMO := runs/demo

.PHONY: install demo test test-matrix lint format docs docs-figures clean

install: $(DEVELOPED)

# Python compiles what it imports and keeps that, also where the environment says otherwise; compiling all of torch
# beforehand would take a minute, and compiling its imports in every process 15 seconds.
unexport PYTHONDONTWRITEBYTECODE

# An interrupted installation leaves no stamp, so the next `make` finishes it.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# What a contributor needs beside it.
$(DEVELOPED): $(INSTALLED)
	$(PIP) --editable '.[dev,docs]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/adatsq-trt build engine digits-flux --target sm120 --output $(DEMO)
	$(BIN)/adatsq-trt check $(DEMO)
	$(BIN)/adatsq-trt generate $(DEMO)

# Each process begins with one half of the tests, so that what a module builds for its tests is built once.
TWO_PROCESSES := -n 2 --dist worksteal
test: $(DEVELOPED)
	$(BIN)/python -m pytest $(TWO_PROCESSES)

# `check` on every pipeline in every type for every kind of bundle, of which `make test` has a part; ten minutes.
test-matrix: $(DEVELOPED)
	$(BIN)/python -m pytest $(TWO_PROCESSES) -m 'matrix or not matrix' tests/cli/test_check_pipelines.py

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	BIN=$(BIN) scripts/typecheck
	BIN=$(BIN) scripts/check-cpp-format
	$(BIN)/python scripts/check-prose

format: $(DEVELOPED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, in build/site. A warning is an error.
docs: $(DEVELOPED)
	scripts/link-package build/package
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# README's picture and tables, and the figures of docs/how-it-works.md, from the demo.
docs-figures: demo
	$(BIN)/python -m scripts.readme_figures
	$(BIN)/python -m benchmarks.size.expected --document README.md
	$(BIN)/adatsq-trt report $(DEMO)
	cp $(DEMO)/report/{policy,sensitivity,pareto,steps}.svg docs/figures/

# Four builds and their comparison; results.json and the table in docs/quality.md. Reuses runs/bench-*.
.PHONY: bench-digits
bench-digits: $(INSTALLED)
	$(BIN)/python -m benchmarks.digits_flux.run --document docs/quality.md

# The forms of --hessian on four models by paired seeds: results.json and the tables in docs/how-it-works.md. Hours of one
# core; what is measured stays in runs/bench-hessian, so a killed one goes on there.
.PHONY: bench-hessian
bench-hessian: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.hessian.run --document docs/how-it-works.md

# Sizes of all layouts and the memory of ONNX Runtime on two Flux models with random weights; quarter of an hour.
.PHONY: bench-engines
bench-engines: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines/run.py

# One nested copy of a weight beside two copies: error and bytes; results.json, a figure and the table in docs/plugin.md.
.PHONY: bench-nested
bench-nested: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.nested.run --document docs/plugin.md

# GPTQ of Flux-dev's wide layers beside llmcompressor's, which gets an environment of its own; results.json.
.PHONY: bench-solver
bench-solver: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.solver.run

# Denoiser calls and seconds of the search on the small models; results.json.
.PHONY: bench-search
bench-search: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.search.run

# The loop beside tiny pipelines with their own and other schedulers; results.json and a table in the page on adapters.
.PHONY: bench-pipelines
bench-pipelines: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pipelines.run --document docs/adapters.md

# Policies searched on a tiny Wan with UniPC and with Euler's method; policies.json and a table in the page on adapters.
.PHONY: bench-pipelines-policies
bench-pipelines-policies: $(DEVELOPED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pipelines.policies --document docs/adapters.md

# Weights once beside uniform and static policies of the same bytes, three searches on each of two models: results.json and
# the table in docs/how-it-works.md. Half an hour of one core; what is measured stays in runs/bench-once.
.PHONY: bench-once
bench-once: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.once.run --document docs/how-it-works.md

# What budgets in bits, bytes and milliseconds choose; results.json and the table in the page about budgets.
.PHONY: bench-budgets
bench-budgets: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.budgets.run --document docs/how-to/choose-a-budget.md

# Seconds and peak memory of every stage on the real configuration of Wan2.1-1.3B, random weights: results.json and the
# table in benchmarks/README.md. Three quarters of an hour, 40 GB of disk in runs/bench-size; a killed one goes on there.
.PHONY: bench-size
bench-size: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.size.run --document benchmarks/README.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.size.run --memory-limit 5GB --layout shared \
		--results benchmarks/size/limit-5GB.json --document benchmarks/README.md --marker size-limit
	$(BIN)/python -m benchmarks.size.compiler --document benchmarks/README.md

# Methods of quantization side by side on the models that draw scenes: results.json, comparisons.json, figures and the
# tables in docs/quality.md. Hours; cells that are there are reused. BENCH=quick: few samples, models of four steps.
.PHONY: bench-quality
bench-quality: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.run \
	  $(if $(filter quick,$(BENCH)),--quick,--document docs/quality.md)

# Methods in the formats of sm120 and sm89 beside resident bytes and roofline milliseconds, and ours at each peer's costs:
# results.json, errors.safetensors and the tables in docs/quality.md. Hours; rows that are there are reused.
.PHONY: bench-hardware
bench-hardware: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.hardware.run --document docs/quality.md

# Units of work in this process and with one and two Ray workers: results.json and the tables in docs/scaling.md.
.PHONY: bench-scaling
bench-scaling: $(DEVELOPED)
	$(BIN)/python -m benchmarks.scaling.run --document docs/scaling.md

# The server comes out of a wheel that pins numpy below 2, so it is installed without its dependencies and apart.
SERVER := $(VENV)/tritonserver
SERVING := $(VENV)/.serving-installed
.PHONY: test-serving bench-serving
$(SERVING): $(DEVELOPED)
	$(PIP) --editable '.[serving]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(SERVER) nvidia-pytriton==0.7.0
	touch $@

# Against the real Triton server: HTTP, gRPC, streams, load and unload, the web page, and a load run. PyTorch's threads
# spin, and would take the processors from the server and its clients.
test-serving: $(SERVING)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests/serving

# What serving costs and what batching gains; benchmarks/serving/results.json. Serves the bundle of `make demo`.
bench-serving: $(SERVING)
	[ -f $(DEMO)/bundle/manifest.json ] || $(MAKE) demo
	$(BIN)/python -m benchmarks.serving.run $(DEMO) --server $(SERVER)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Damaged files and odd command lines for a while; the test suite runs one short round of the same.
SECONDS ?= 60
.PHONY: fuzz
fuzz: $(DEVELOPED)
	FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/fuzz -x
