# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
# `make quickstart ARGS=--fresh` forgets the previous quickstart run and begins again; `make bench ARGS="--only unique"` runs a part.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TIER ?= unit distributed integration gpu slurm

.PHONY: help install quickstart test test-fast test-slow slurm-packages test-slurm lint format bench clean

help:
	@echo "make quickstart   install, prepare real text, train, kill, resume, export, generate (about 10 minutes on 2 cores)"
	@echo "make test         lint, types and all tests"
	@echo "make test-fast    unit tests only"
	@echo "make test-slow    what make test leaves out: every layout, the whole reshard grid, fifty kills during saves"
	@echo "make test-slurm   tests on a real SLURM of virtual nodes; installs Debian's packages of it where they are missing"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff rewrite the sources"
	@echo "make bench        benchmarks of the memory operations against their peers"
	@echo "make clean        remove what the other targets made, but not runs/ and data/"

# Reinstalled only when the declared dependencies change; needs no network afterwards.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing megamem and its libraries into $(VENV): some minutes, about 2 GB with the CPU build of torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m megamem_launch.quickstart $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -m "not slow" $(addprefix tests/,$(TIER))

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" tests/unit

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow tests

# The tests start their own daemons from Debian's packages and use no service of the system.
slurm-packages: $(STAMP)
	@missing=$$($(BIN)/python -m megamem.testing.slurm_cluster missing) || exit 1; \
	test -z "$$missing" || { root=$$(test "$$(id -u)" = 0 || echo sudo -n); \
	$$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends $$missing; } \
	    || echo "SLURM could not be installed ($$missing): its tests are skipped"

test-slurm: slurm-packages
	$(BIN)/python -m pytest -m "not slow" tests/slurm

bench: $(STAMP)
	$(BIN)/python kernels/benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
