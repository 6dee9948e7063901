# `make quickstart`, `make test` and `make ci`. Each creates the virtual environment that it needs.

# A supported interpreter of this machine; `make PYTHON=... VENV=...` overrides.
PYTHON ?= $(shell for python in python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) \
	  $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) python3; do \
	$$python -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
	  2>/dev/null && echo $$python && break; done)
VENV ?= .venv
WORKDIR ?= runs/quickstart
# Test processes that run side by side; each takes some 3 GB and, at times, several cores.
JOBS ?= 2
# Setuptools warns of folders that have the package's name, as this one does on purpose.
PIP = PYTHONWARNINGS=ignore $(1)/bin/python -m pip install --quiet
PYTEST = -m pytest --numprocesses=$(JOBS) --dist=worksteal

# On Linux: huge pages for large buffers. XLA on CPU allocates fresh ones in every step, and mapping
# them 4 KB at a time is a third of a small model's step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-slow test-parity ci lint clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python -m bam_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

# The default tests: minutes.
test: $(VENV)/installed-dev lint
	$(VENV)/bin/python $(PYTEST)

# The tests marked slow: several processes, real kills and full disks, launch scripts, fuzzing.
test-slow: $(VENV)/installed-dev
	$(VENV)/bin/python $(PYTEST) -m slow

# Against transformers and lm-eval, in an environment of its own, since torch is large.
test-parity: $(VENV)-parity/installed-parity
	$(VENV)-parity/bin/python $(PYTEST) -m '' tests/parity

# What continuous integration runs.
ci: test test-slow test-parity

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

%/bin/python:
	@test -n "$(PYTHON)" || { echo 'bam_jax needs Python 3.12 or 3.13: install one, or name it with PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $*
	$@ -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml requirements.txt | $(VENV)/bin/python
	$(call PIP,$(VENV)) --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml requirements.txt | $(VENV)/bin/python
	$(call PIP,$(VENV)) --editable '.[dev]'
	@touch $(VENV)/installed $@

$(VENV)-parity/installed-parity: pyproject.toml requirements.txt | $(VENV)-parity/bin/python
	$(call PIP,$(VENV)-parity) --editable '.[parity]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-parity .cache
