# make run    install what is needed into .venv and execute the notebook, top to bottom
# make test   the same, with the test tools: lint, check the format, and run all tests
# make clean  remove .venv and what runs have written (the reference run stays)

PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN_TOOLS = nbclient ipykernel
NOTEBOOK = QLoRA_BERT_TextClassification.ipynb
TEST_TOOLS = pytest hypothesis nbformat nbconvert papermill ruff onnxscript

.PHONY: run test clean

run: .venv/.run-installed
	.venv/bin/python scripts/run_notebook.py

test: .venv/.test-installed
	.venv/bin/ruff check --quiet benchmarks scripts tests $(NOTEBOOK)
	.venv/bin/ruff format --check --quiet benchmarks scripts tests $(NOTEBOOK)
	.venv/bin/python -m pytest

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.10 or newer is needed; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 run" if v < (3, 10) else 0)'
	$(PYTHON) -m venv .venv

.venv/.run-installed: requirements.txt constraints.txt Makefile | .venv/bin/python
	$(PIP_INSTALL) --requirement requirements.txt $(RUN_TOOLS)
	@touch $@

.venv/.test-installed: .venv/.run-installed
	$(PIP_INSTALL) $(TEST_TOOLS)
	@touch $@

clean:
	rm -rf .venv outputs wandb Data/*.png Data/results.json
