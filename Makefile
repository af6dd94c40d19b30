# The two commands: `make demo` and `make test`. Both install what is missing and are safe to run again.

# The distribution's Python where there is one: other accounts cannot run an interpreter below somebody's home.
PYTHON ?= $$(test -x /usr/bin/python3 && echo /usr/bin/python3 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test lint check unit bench soak clean

help:
	@echo "make demo     set up all, run a training job on 2 of 8 GPUs (stand-ins where there are none)"
	@echo "make test     set up all, run the whole suite"
	@echo "make install  make $(BIN)/gpujobs"
	@echo "make check    lint, types, import rules, unit tests (under a minute)"
	@echo "make lint     of that, all but the tests"
	@echo "make bench    the benchmarks"
	@echo "make soak     the long forms of the random runs"

install: $(VENV)/.installed gpujobs/init/gpujobs-init

$(VENV)/.installed: requirements.lock pyproject.toml setup.py
	@sh scripts/prerequisites
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

gpujobs/init/gpujobs-init: gpujobs/init/gpujobs-init.c $(VENV)/.installed
	test $@ -nt $< || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/python -m tests.lab.demo

test: install
	$(BIN)/python -m tests.lab up
	cd "$$($(BIN)/python -m tests.lab checkout)" && $(PYTEST)

unit: install
	$(PYTEST) --numprocesses=auto tests/unit tests/arch

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) -q --numprocesses=auto tests/unit tests/arch

bench: install
	$(BIN)/python -m tests.lab up
	$(BIN)/python -m bench.launch

soak: install
	$(BIN)/python -m tests.lab up
	cd "$$($(BIN)/python -m tests.lab checkout)" && GPUJOBS_SOAK=1 $(PYTEST) tests/soak tests/contract/test_service_machine.py

clean:
	rm -rf $(VENV) build gpujobs/init/gpujobs-init *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
