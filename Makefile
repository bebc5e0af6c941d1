# Everything a contributor runs. `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo

.PHONY: install demo test lint format clean

install: $(INSTALLED)

# An interrupted installation leaves no stamp, so the next `make` finishes it.
$(INSTALLED): pyproject.toml constraints.txt
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/adatsq-trt build engine digits-flux --target sm120 --output $(DEMO)
	$(BIN)/adatsq-trt check $(DEMO)
	$(BIN)/adatsq-trt generate $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	BIN=$(BIN) scripts/typecheck
	scripts/check-cpp-format

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Four builds and their comparison; results.json and the table in README.md. Reuses runs/bench-*.
.PHONY: bench-digits
bench-digits: $(INSTALLED)
	$(BIN)/python benchmarks/digits_flux/run.py --readme README.md

# Sizes of all layouts and the memory of ONNX Runtime on two Flux models with random weights; quarter of an hour.
.PHONY: bench-engines
bench-engines: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
