# make demo [VARIANT=d|x|h]   train on two CPU cores, evaluate, write report.html
# make test                   the tests that every change must pass; make test-all (nightly) has the slow ones too
VARIANT ?= h
PYTHON ?= python3
VENV := .venv

.PHONY: help demo test test-all lint format clean

help:
	@sed -n '1,2s/^# //p' Makefile; echo 'make lint | format | clean'

# torch comes first and by exact version: a plain resolve takes a build with gigabytes of CUDA libraries
$(VENV)/installed: setup.py requirements-ci.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -r requirements-ci.txt
	$(VENV)/bin/pip install -q --no-deps -e .
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python -m tools.demo --variant $(VARIANT)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not gpu"

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
