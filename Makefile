# make run, make test: nothing else is needed after a clone. Everything lives in .venv and out/.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
RUN_ARGS ?= --memory 64M --host-ram 24M --check --trace out/swap-storm.ndjson

.PHONY: venv run test lint bench bench-check soak live fuzz-live matrix golden seed-doc clean help

help:
	@echo 'make run          a guest on a host with too little RAM, checked and traced to out/'
	@echo 'make test         the tests'
	@echo 'make lint         ruff, mypy --strict, the law of imports'
	@echo 'make bench        measure; bench-check holds the numbers to bench/targets.toml'
	@echo 'make soak         random runs: SOAK_SEEDS (20) seeds from SOAK_FROM (100), SOAK_STEPS (20000) steps each, SOAK_OPS (120000) host operations'
	@echo 'make live         the scenarios on this machine'\''s own KVM, where it can (refault/scenarios/live/README.md)'
	@echo 'make fuzz-live    random scenarios there and here: FUZZ_COUNT (10) seeds of each group from FUZZ_FROM (0)'
	@echo 'make matrix       every payload with each MMU, on each kernel, with 1, 2 and 4 vCPUs, as a table'
	@echo 'make golden       record the golden traces of the payloads anew (PAYLOADS="migrate smp": only those)'
	@echo 'make seed-doc     run the commands of docs/seed.md and write their output there'
	@echo 'make venv         only the environment, with the versions of constraints.txt'

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/venv
	@./.ci/venv $(VENV)

run: $(STAMP)
	@mkdir -p out
	@$(BIN)/refault run swap-storm $(RUN_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m bench $(GROUPS)

bench-check: $(STAMP)
	$(BIN)/python -m bench --check $(GROUPS)

SOAK_FROM ?= 100
SOAK_SEEDS ?= 20
SOAK_STEPS ?= 20000
SOAK_OPS ?= 120000
soak: $(STAMP)
	REFAULT_OPS=$(SOAK_OPS) REFAULT_STEPS=$(SOAK_STEPS) REFAULT_SEEDS=$$(seq -s, $(SOAK_FROM) $$(($(SOAK_FROM) + $(SOAK_SEEDS) - 1))) \
	REFAULT_PROGRESS=1 HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -q -s -n $(JOBS) --timeout=0 tests/property tests/payloads/test_everything.py

# One at a time: events are the whole machine's.
live: $(STAMP)
	REFAULT_LIVE=1 $(BIN)/python -m pytest -q -p no:xdist tests/live

FUZZ_FROM ?= 0
FUZZ_COUNT ?= 10
fuzz-live: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tests.live.random_scenarios --from $(FUZZ_FROM) --count $(FUZZ_COUNT) $(FUZZ_ARGS)

matrix: $(STAMP)
	REFAULT_MATRIX=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/payloads/test_matrix.py

# Only ever on purpose: look at the difference before you commit it.
golden: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/golden/record.py $(PAYLOADS)

# The outputs in docs/seed.md, from its commands.
seed-doc: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/refault/seed_doc.py

clean:
	rm -rf out build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
