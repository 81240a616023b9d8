# Firstlight's commands; each sets up everything it needs by itself.

PYTHON ?= python3# the interpreter of a new .venv; the system's own unless given: make PYTHON=python3.12
LOG := .venv/install.log
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
NEEDED := Firstlight needs Python 3.11, 3.12 or 3.13; install one and give it: make PYTHON=/path/to/python

.DEFAULT_GOAL := help
.PHONY: help demo evaluate studio arena test slow lint lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: .venv/.installed  ## train a small model on this machine, from rendered landscapes to pictures; goes on where it stopped
	@.venv/bin/python train.py resume=true

evaluate: .venv/.installed  ## measure what the demo learnt: a card and a report beside its run
	@.venv/bin/python scripts/evaluate.py checkpoint=runs/landscapes

studio: .venv/.installed  ## a page to type prompts into, for every run below runs/; prints its address
	@.venv/bin/python scripts/studio.py

arena: .venv/.installed  ## blind votes between two ways to sample the demo; prints its address
	@test -d arenas/landscapes || .venv/bin/python scripts/arena.py make arenas/landscapes --prompts docs/landscape_prompts.jsonl \
		--checkpoint quick runs/landscapes num_steps=2 --checkpoint usual runs/landscapes
	@.venv/bin/python scripts/arena.py serve arenas/landscapes

test: .venv/.installed  ## the tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest --numprocesses=auto --dist=loadfile

slow: .venv/.installed  ## the tests that take minutes, and those of several processes
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -m 'slow or distributed'

lint: .venv/.installed  ## format, lint and types, nothing changed
	@echo "checking format, lint and types"
	@failed=0; \
	.venv/bin/python -m ruff format --check . || failed=1; \
	.venv/bin/python -m ruff check --quiet . || failed=1; \
	.venv/bin/python -m mypy --no-error-summary || failed=1; \
	exit $$failed

# Written beside the old lock and renamed over it, so that a failure leaves the old one as it is. uv.lock names
# the hosts that it was resolved from, and does not stay.
lock: .venv/.installed  ## requirements.lock anew: the newest versions that pyproject.toml allows
	@echo "resolving pyproject.toml into requirements.lock"
	@.venv/bin/python -m pip --quiet install uv
	@trap 'rm -f uv.lock requirements.lock.new' EXIT; set -e; \
	.venv/bin/uv --quiet lock --upgrade --python .venv/bin/python; \
	.venv/bin/uv --quiet export --frozen --format requirements-txt --no-emit-project --no-header \
		--output-file requirements.lock.new; \
	if grep -nF '://' requirements.lock.new; then echo "requirements.lock would name a host"; exit 1; fi; \
	mv requirements.lock.new requirements.lock

clean:  ## remove .venv and the caches; runs/ and shards/ stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that cannot be used (half made, moved, of another Python) is made again; a good one is kept.
# uv is several times as fast as pip, but reads none of pip's configuration: where it fails, pip has its turn. Byte-code is
# compiled once here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every command would spend seconds on it.
.venv/.installed: requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "there is no '$(PYTHON)' here. $(NEEDED)"; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1). $(NEEDED)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@.venv/bin/python -c 'import pip; $(SUPPORTED)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "installing the packages of requirements.lock into .venv (5.4 GB, a few minutes the first time)"
	@{ .venv/bin/python -m pip install uv \
		&& .venv/bin/uv pip install --compile-bytecode --python .venv/bin/python --require-hashes -r requirements.lock \
		|| { echo "without uv:"; .venv/bin/python -m pip install --require-hashes -r requirements.lock; }; \
	} </dev/null >$(LOG) 2>&1 || { tail -n 5 $(LOG); echo "the packages could not be installed; all of it is in $(LOG)"; exit 1; }
	@touch $@
