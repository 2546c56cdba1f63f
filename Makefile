# make run, make test: nothing else is needed after a clone. Everything lives in .venv and out/.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
RUN_ARGS ?= --memory 64M --host-ram 24M --check --trace out/swap-storm.ndjson

.PHONY: venv run test lint bench bench-check bench-update soak live-less clean help

help:
	@echo 'make run          a guest on a host with too little RAM, checked and traced to out/'
	@echo 'make test         the tests'
	@echo 'make lint         ruff, mypy --strict, the law of imports'
	@echo 'make live-less    the tests without those that would use /dev/kvm'
	@echo 'make bench        measure; bench-check compares with the recorded ratios, bench-update records'
	@echo 'make soak         random runs until something breaks or SOAK_SECONDS (600) are over'
	@echo 'make venv         only the environment, with the versions of constraints.txt'

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/venv
	@./.ci/venv $(VENV)

run: $(STAMP)
	@mkdir -p out
	@$(BIN)/refault run swap-storm $(RUN_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) -m 'not soak' $(TESTS)

live-less: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) -m 'not soak and not live' $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@mkdir -p out
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-columns=min,median,ops --benchmark-json=out/bench.json

bench-check: bench
	$(BIN)/python bench/check.py out/bench.json

bench-update: bench
	$(BIN)/python bench/check.py --update out/bench.json

SOAK_SECONDS ?= 600
soak: $(STAMP)
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -q -m soak --timeout=0 tests

clean:
	rm -rf out build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
