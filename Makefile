# make demo [VARIANT=d|x|h]   train on two CPU cores, evaluate, write report.html
# make test                   the tests that every change must pass; make test-all (nightly) has the slow ones too
# make test-gpu               the tests that need a GPU
# make test-newest            the tests of what stands on Megatron-core, with the newest core (NEWEST_CORE)
VARIANT ?= h
PYTHON ?= python3
VENV := .venv
NEWEST_CORE := 0.19.2
NEWEST_VENV := .venv-newest
NEWEST_ROOMS := models ops parallel checkpoint training runs inference hf commands/test_convert_checkpoint.py commands/test_convert_refusals.py

.PHONY: help demo test test-all test-newest test-gpu lint format clean

help:
	@sed -n '1,4s/^# //p' Makefile | sed 's/NEWEST_CORE/$(NEWEST_CORE)/'; echo 'make lint | format | clean'

# torch comes first and by exact version: a plain resolve takes a build with gigabytes of CUDA libraries
$(VENV)/installed: setup.py requirements-ci.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -r requirements-ci.txt
	$(VENV)/bin/pip install -q --no-deps -e .
	touch $@

# Newer cores want Python 3.12; all pins but core's are the same, so that a difference is core's
$(NEWEST_VENV)/installed-$(NEWEST_CORE): setup.py requirements-ci.txt
	python=$$(.ci/newest_python) && $$python -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install -q torch==2.13.0
	grep -v -e '^megatron-core==' -e '^triton==' requirements-ci.txt >$(NEWEST_VENV)/requirements.txt
	$(NEWEST_VENV)/bin/pip install -q -r $(NEWEST_VENV)/requirements.txt
	$(NEWEST_VENV)/bin/pip install -q --no-deps megatron-core==$(NEWEST_CORE)
	$(NEWEST_VENV)/bin/pip install -q --no-deps -e .
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python -m tools.demo --variant $(VARIANT)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not gpu"

test-newest: $(NEWEST_VENV)/installed-$(NEWEST_CORE)
	@$(NEWEST_VENV)/bin/python -c 'from importlib.metadata import version as v; import platform; \
	print("Python", platform.python_version(), "torch", v("torch"), "megatron-core", v("megatron-core"))'
	$(NEWEST_VENV)/bin/python -m pytest -m "not slow and not gpu" $(addprefix tests/,$(NEWEST_ROOMS))

# On a machine with an NVIDIA GPU, in an environment that has torch for it (PYTHON=...)
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x launch/*.sh
	$(VENV)/bin/hadolint Dockerfile

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(NEWEST_VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
