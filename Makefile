# Every target sets up .venv first, from pinned versions; nothing else has to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo check test test-slow lint types bench docs clean

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm # not torchvision
	touch $@

demo: $(VENV)/installed ## generate pictures with dense and with sparse attention
	$(BIN)/python -m examples.photo_dit.demo $(DEMO_ARGS)

# Two processes, each with its own half of the processor: threads of both would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2
FAST := tests/test_imports.py tests/caller tests/cost tests/ops tests/policies tests/report tests/steps \
	tests/passes/judge tests/passes/masks tests/passes/replace

check: lint types ## the fast half of the tests, in under two minutes
	$(PYTEST) -m "not slow" $(FAST)

test: lint types ## everything that CI checks, without the slow tests
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

bench: $(VENV)/installed ## the CPU record behind the README's table
	$(BIN)/python benchmarks/cpu.py --output benchmarks/results/cpu.json

docs: $(VENV)/docs-installed ## the documentation as a static site, in out/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir out/site

$(VENV)/docs-installed: $(VENV)/installed # not a part of it: tests need none of this
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
