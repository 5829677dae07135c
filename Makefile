# Everything runs in .venv, made once from $(PYTHON) and requirements.lock.

PYTHON ?= python3
WORKDIR ?= runs/quickstart

# One stamp a Python version: asking for another one makes .venv anew.
STAMP := .venv/installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.DEFAULT_GOAL := help
.PHONY: help env train test test-slow test-faults soak lint lock clean-env

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

env: $(STAMP)  ## makes .venv (PYTHON=python3.12 for another Python)

$(STAMP): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit("error: PYTHON=$(PYTHON): wanted Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "making .venv; this takes a few minutes, once" >&2
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet -r requirements.lock
	@.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

train: env  ## trains configs/quickstart.py into WORKDIR=runs/quickstart and writes its report
	.venv/bin/python -m experiments.train --config=configs/quickstart.py --workdir=$(WORKDIR)

# Compiling is most of these tests' time: less without LLVM's optimisations, and again without the fusion emitters of the
# jaxlib for Python 3.11; a newer one knows no such flag and refuses to start with it. Slow tests run what is shipped.
test: lint  ## lint, and every test but the slow ones
	quick=--xla_backend_optimization_level=0; \
	.venv/bin/python -c 'import sys, jaxlib.version as v; sys.exit(v.__version_info__ >= (0, 11))' && \
	quick="$$quick --xla_cpu_use_fusion_emitters=false"; \
	XLA_FLAGS="$$XLA_FLAGS $$quick" .venv/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: env  ## the slow tests
	.venv/bin/python -m pytest -q -m slow

test-faults: env  ## what is promised when things break, with real processes, signals and files; ends with a table
	.venv/bin/python -m pytest -q -m fault

soak: WORKDIR = runs/soak
soak: env  ## an hour of training with a fault every two minutes, beside a calm run of the same steps, into WORKDIR=runs/soak
	.venv/bin/python -m experiments.soak.study --workdir=$(WORKDIR)

lint: env  ## ruff
	.venv/bin/ruff check --quiet .

lock:  ## resolves the newest versions for each supported Python into requirements.lock
	$(PYTHON) tools/lock.py python3.11 python3.12 > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean-env:  ## removes .venv
	rm -rf .venv
