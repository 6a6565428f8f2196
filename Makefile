# Two commands matter: `make demo` and `make test`. Each sets up what it needs.
# `make test PYTHON=python3.13` tests another version, in an environment of its own.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What the product itself needs takes half of the time of all that its tests need.
RUNTIME := $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/.runtime)
# Only what is imported is compiled, then, of 12,000 files: 36 s of installing instead of 61.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e

# Where it is set, as in many images of containers, each command would compile all that it imports: 10 s
# in place of 5 to a first token. What the installation ends with leaves bytecode for all later ones.
unexport PYTHONDONTWRITEBYTECODE
COMPILE = $(BIN)/python -c 'import luthier.inference.generation, transformers.models.llama.modeling_llama'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check migration format docs bench clean

help:  ## list what can be done
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	$(COMPILE)
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	$(COMPILE)
	@touch $@

install: $(INSTALLED)  ## virtual environment in .venv with the locked versions

demo: $(RUNTIME)  ## tune SmolLM2 on the sample data and compare before and after
	$(BIN)/luthier demo

# One more than there are cores: tests of servers and workers wait for most of their time. A file goes to
# one worker, as what its tests share is made once for each. A test that ended its worker begins again in a
# new one: two new ones tell. The order of files is that of conftest.py.
WORKERS = $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))

test: $(INSTALLED)  ## the test suite (9 to 16 minutes on 2 cores)
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-slow: $(INSTALLED)  ## tests of minutes, and further proofs of tested behaviour
	$(BIN)/pytest -q -m slow

check: $(INSTALLED)  ## lint, types, import order, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff check --quiet --preview --select DOC102 src  # parameters of docstrings exist
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/prose.py
	$(BIN)/python docs/names.py
	$(BIN)/mkdocs build --strict

# An empty database at the last revision is compared with the models.
migration: $(INSTALLED)  ## write the migration for changed tables: make migration m="Add notes to jobs"
	LUTHIER_HOME=$$(mktemp -d) && export LUTHIER_HOME && $(BIN)/alembic upgrade head && \
	$(BIN)/alembic revision --autogenerate -m "$(m)" \
	  --rev-id $$(printf %04d $$(($$(ls src/luthier/server/tables/migrations/versions/*.py | wc -l) + 1)))

format: $(INSTALLED)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## write docs/reference.md from the code, and all pages to build/site
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)  ## speed and memory against TRL (needs DATA=…/banking77/train.jsonl)
	$(BIN)/python benchmarks/sft_vs_trl.py $(DATA)

clean:  ## remove the environment and caches; models in LUTHIER_HOME stay
	rm -rf $(VENV) .venv-* build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
