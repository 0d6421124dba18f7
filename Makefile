# make demo : the whole job on the embedded images, in an environment of its own
# make test : every test
# make check: lint, types, import contracts
# make testbed: the bed that benchmarks/method.py runs on: pool, tasks, specialists, stores
SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
# zarr 3 needs Python 3.11; PYTHON=/path/to/python names another interpreter.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help demo test check gpu clean testbed
help:
	@sed -n 's/^# make/make/p' Makefile

$(PY):
	@test -n "$(PYTHON)" || { echo "preceptor needs Python 3.11 or newer (zarr 3 does); found none. \
	Install one, or say make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "== creating $(VENV) with $(PYTHON) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "python's venv module is missing: sudo apt install python3-venv"; exit 1; }

$(VENV)/.demo: setup.cfg pyproject.toml | $(PY)
	@echo "== installing preceptor with the demo's pretrained teachers (torch is large: minutes)"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(PY)
	@echo "== installing preceptor with the demo's teachers and the test tools (torch is large: minutes)"
	$(INSTALL) -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(PY) examples/demo.py

# A process a core and one more, since some wait for disks and for processes of their own; each
# computes with one thread.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest --dist worksteal \
	-n $$($(PY) -c 'import os; print(min(8, 1 + (os.cpu_count() or 1)))')

# mypy does not follow the root's mapping to the package, so it gets a link under the package's name.
check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/preceptor
	MYPYPATH=$(VENV)/types $(VENV)/bin/mypy -p preceptor
	$(VENV)/bin/lint-imports --config setup.cfg

$(VENV)/.testbed: setup.cfg pyproject.toml | $(PY)
	$(INSTALL) -e '.[testbed]'
	@touch $@

testbed: $(VENV)/.testbed
	$(PY) benchmarks/testbed/make.py --out outputs/testbed

# Every GPU test and benchmark; needs torch, triton and pytest only (no installation, no network).
gpu:
	$(or $(shell test -x $(PY) && echo $(PY)),python3) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
