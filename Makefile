# make quickstart, make test: all they need is make and Python >= 3.11; see `make help`.

PYTHON ?= python3
PARITY_PYTHON ?= $(PYTHON)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-quick mutations parity tpu clean
# Each worker takes whole files, so that fixtures are built once; tests/conftest.py has their order.
PYTEST := .venv/bin/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder --durations=20

help:
	@echo 'make quickstart  dense training, sparse upcycling and their controls; a table and a plot'
	@echo 'make test        ruff and all tests that guard behaviour; about 20 minutes on 2 cores'
	@echo 'make test-quick  without trained runs, suites and processes; at most 3 minutes'
	@echo 'make mutations   breaks the code on purpose, and asks which test notices; an hour'
	@echo 'make parity      compares T5 and ViT with transformers and torch, in a venv of its own'
	@echo 'make tpu         compiles for TPUs, which need not be there, in a venv of its own'
	@echo 'make venv        makes .venv with the pinned versions; the others do it by themselves'
	@echo 'make clean       removes the venvs, caches and programs compiled by tests; runs/ stays'
	@echo 'PYTHON=python3.12 make ...  chooses the interpreter (3.11 or later) for a new .venv'

venv: .venv/stamp

.venv/stamp: setup.py constraints.txt
	$(call check_python,$(PYTHON))
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv-parity/stamp: setup.py constraints.txt
	$(call check_python,$(PARITY_PYTHON))
	test -x .venv-parity/bin/python || $(PARITY_PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  -e '.[parity]'
	@touch $@

.venv-tpu/stamp: setup.py constraints.txt
	$(call check_python,$(PYTHON))
	test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[tpu]'
	@touch $@

quickstart: .venv/stamp
	.venv/bin/python -m experiments.main --suite=quickstart

test: .venv/stamp
	.venv/bin/ruff check
	$(PYTEST)

test-quick: .venv/stamp
	.venv/bin/ruff check
	$(PYTEST) -m 'not (processes or suites or runs or mutations)'

mutations: .venv/stamp
	.venv/bin/python -m pytest -m mutations tests/mutations
	.venv/bin/python -m tests.mutations.run

parity: .venv-parity/stamp
	.venv-parity/bin/python -m tests.parity.make_golden --check

tpu: .venv-tpu/stamp
	.venv-tpu/bin/python -m tests.aot.live

clean:
	rm -rf .venv .venv-parity .venv-tpu .pytest_cache .ruff_cache build *.egg-info
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/moejax/tests"
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define check_python
	@command -v $(1) >/dev/null || { \
	  echo 'make: $(1): not found; install Python >= 3.11, or name it: PYTHON=... make' >&2; exit 1; }
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(1) is $$($(1) -V 2>&1); moejax needs Python >= 3.11: PYTHON=python3.11 make" >&2; \
	  exit 1; }
endef
