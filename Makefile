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

# Hours: 100,000 seeds of the simulation, and thousands of killed servers.
soak: install
	SIMULATION_SEEDS=100000 KILLS=3000 $(BIN)/python -m pytest -q -n 2 --dist worksteal --timeout 86400 tests/sim tests/crash

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

goals: install
	$(BIN)/python -m benchmarks.goals

clean:
	rm -rf $(VENV) build dist *.egg-info demo-report
