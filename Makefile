# Two commands: `make quickstart` and `make test`. Each makes the virtual environment it needs.

# The newest interpreter that the tests pass with; `make PYTHON=... VENV=...` overrides.
PYTHON ?= $(shell for python in python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) \
	  python3.11 $(wildcard $(HOME)/.pyenv/versions/3.11.*/bin/python) python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  2>/dev/null && echo $$python && break; done)
VENV ?= .venv
PARITY_PYTHON ?= $(PYTHON)
WORKDIR ?= runs/quickstart
# Processes that run the tests side by side; each takes some 3 GB and, at times, several cores.
JOBS ?= 2
PYTEST = -m pytest --numprocesses=$(JOBS) --dist=worksteal

# On Linux: large pages for large buffers. XLA on CPU takes fresh ones for every step, and mapping them
# 4 KB at a time is a third of a small model's step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-slow test-parity lint clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python -m bam_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/installed-test lint
	$(VENV)/bin/python $(PYTEST)

# Against Hugging Face's Cohere and Mixtral, and what lm-eval makes of them; its own environment, since
# torch is large.
test-parity: $(VENV)-parity/installed-test
	$(VENV)-parity/bin/python $(PYTEST) tests/parity

test-slow: $(VENV)/installed-test
	$(VENV)/bin/python $(PYTEST) -m slow

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

$(VENV)-parity/bin/python:
	$(PARITY_PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/python -m pip install --quiet --upgrade pip

$(VENV)-parity/installed-test: tests/parity/requirements.txt tests/requirements.txt \
		bam_jax/tasks/requirements.txt requirements.txt | $(VENV)-parity/bin/python
	$(VENV)-parity/bin/python -m pip install --quiet -r tests/parity/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-parity
