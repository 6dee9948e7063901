# Two commands: `make quickstart` and `make test`. Each makes the virtual environment it needs.

# The newest interpreter that the tests pass with; `make PYTHON=... VENV=...` overrides.
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  2>/dev/null && echo $$python && break; done)
VENV ?= .venv
WORKDIR ?= runs/quickstart

# On Linux: large pages for large buffers. XLA on CPU takes fresh ones for every step, and mapping them
# 4 KB at a time is a third of a small model's step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-slow lint clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python -m bam_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/installed-test lint
	$(VENV)/bin/python -m pytest

test-slow: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo 'bam_jax needs Python 3.11 or 3.12: install one, or name it with PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/installed-test: tests/requirements.txt requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r tests/requirements.txt
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV)
