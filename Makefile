# Everything a newcomer or a developer types. `make demo` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEXT ?=
STAMP := $(VENV)/.installed

.PHONY: demo test soak seeded check bench bench-gpu goals stubs install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[cpu,hf,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/memstore demo $(if $(TEXT),--text "$(TEXT)")

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

# Hours: 100,000 seeds of the simulation, thousands of killed servers, mutations by the hundred thousand, abuse twenty
# times over, thousands of rounds in search of a leak; then every decoder is fuzzed for FUZZ_S seconds, guided by what is
# covered, from where the last soak ended.
SEEDS ?= 100000
KILLS ?= 3000
MUTATIONS ?= 100000
ABUSE ?= 1000
LEAK_ROUNDS ?= 5000
FUZZ_S ?= 600
soak: install
	$(BIN)/pip install -q -c constraints.txt -e '.[soak]'
	SIMULATION_SEEDS=$(SEEDS) KILLS=$(KILLS) MUTATIONS=$(MUTATIONS) ABUSE=$(ABUSE) LEAK_ROUNDS=$(LEAK_ROUNDS) \
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --timeout 86400 tests/sim tests/crash tests/fuzz tests/security
	targets=$$($(BIN)/python -m tests.fuzz.guided --list) && test -n "$$targets" && for target in $$targets; do \
	$(BIN)/python -m tests.fuzz.guided $$target --seconds $(FUZZ_S) --corpus .fuzz/$$target || exit 1; done

# Plants every bug of tests/seeded/bugs.toml into a copy of the tree; fails where the tests do not notice one.
seeded: install
	$(BIN)/python -m tests.seeded.seeding

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code
	$(BIN)/python -m pytest -q tests/unit/test_layering.py tests/unit/test_stubs.py

stubs: install
	$(BIN)/python tools/generate_stubs.py

bench: install
	$(BIN)/python -m benchmarks.run

bench-gpu: install
	$(BIN)/python -m benchmarks.gpu_search
	$(BIN)/python -m benchmarks.codes
	$(BIN)/python -m benchmarks.decode_overlap
	$(BIN)/python -m benchmarks.planes
	$(BIN)/python -m benchmarks.large
	$(BIN)/python -m benchmarks.overload --device cuda

goals: install
	$(BIN)/python -m benchmarks.goals

clean:
	rm -rf $(VENV) build dist *.egg-info demo-report
