# make quickstart, make test: all they need is make and Python >= 3.11; see `make help`.

PYTHON ?= python3
PARITY_PYTHON ?= $(PYTHON)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test parity tpu clean

help:
	@echo 'make quickstart  dense training, sparse upcycling and their controls; a table and a plot'
	@echo 'make test        ruff and all tests'
	@echo 'make parity      compares T5 and ViT with transformers and torch, in a venv of its own'
	@echo 'make tpu         compiles for TPUs, which need not be there, in a venv of its own'
	@echo 'make venv        makes .venv with the pinned versions; the others do it by themselves'
	@echo 'make clean       removes the venvs and caches; runs/ stays'
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
	.venv/bin/python -m pytest -n 2 --dist=worksteal --durations=20

parity: .venv-parity/stamp
	.venv-parity/bin/python -m tests.parity.make_golden --check

tpu: .venv-tpu/stamp
	.venv-tpu/bin/python -m tests.aot.live

clean:
	rm -rf .venv .venv-parity .venv-tpu .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define check_python
	@command -v $(1) >/dev/null || { \
	  echo 'make: $(1): not found; install Python >= 3.11, or name it: PYTHON=... make' >&2; exit 1; }
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(1) is $$($(1) -V 2>&1); moejax needs Python >= 3.11: PYTHON=python3.11 make" >&2; \
	  exit 1; }
endef
