# make quickstart   pretrain, transfer, evaluate, draw: a few minutes on two cores
# make test         the test suite
# make test-slow    the tests that it leaves out
# PYTHON=python3.12 chooses the interpreter; VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.quickstart

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

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
