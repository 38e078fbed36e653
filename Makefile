# make demo   sets up $(VENV) and runs the embedded pair
# make test   sets up $(VENV) with everything the tests need, then: lint, types, all tests
# Set up once: again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
PINNED = pyproject.toml constraints.txt
COMPILERS = $(VENV)/bin/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["aot"])'

.PHONY: demo test lint types pytest clean

demo: $(VENV)/.installed
	$(VENV)/bin/eagle-jax demo

test: lint types pytest

lint: $(VENV)/.test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test-installed
	$(VENV)/bin/mypy

pytest: $(VENV)/.test-installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations 10

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PINNED) | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test-installed: $(PINNED) | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt --editable '.[torch,train,test]'
	touch $(VENV)/.installed
# The compilers of other machines' accelerators lie beside the packages: see bench/compilers.py. x86 Linux only.
ifeq ($(shell uname -sm),Linux x86_64)
	rm -rf $(VENV)/aot
	$(PIP) install --constraint constraints.txt --no-deps --target $(VENV)/aot $$($(COMPILERS))
endif
	touch $@
