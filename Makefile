# make quickstart   pretrain, transfer, evaluate, draw: a few minutes on two cores
# make test         the test suite
# PYTHON=python3.12 chooses the interpreter; VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.quickstart

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test,tensorboard]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
