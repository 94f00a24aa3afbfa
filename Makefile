# Everything a developer does. `make setup` needs Python >= 3.11 and brings the rest; each target does only what is not done yet.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := lab,test,lint,docs,bench
NOTEBOOKS ?= .
TESTS ?=
JOBS ?= 2
N ?= 200
KERNELS ?= 4
SEED ?=
STAMP := $(VENV)/.installed

# Never the user's own environment: the product freezes the one it runs in, and that is to be .venv.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help setup run test fuzz soak lint docs bench frontend pictures clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## everything needed: system packages, .venv, runsc, the kernelspecs, the image
	@$(BIN)/jupyter sandbox setup
	@$(BIN)/jupyter sandbox install --sys-prefix
	@$(BIN)/jupyter sandbox image build

# An editable install copies the built front end to where JupyterLab looks for it, so a new one is installed anew.
$(STAMP): pyproject.toml sandbox_gateway/__init__.py sandbox_gateway/_labextension/package.json tools/system_packages.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: $(PYTHON) is missing or older than Python 3.11; name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@sh tools/system_packages.sh "$$(command -v $(PYTHON))"
	@test -x $(BIN)/python && $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "setup: making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "setup: installing sandbox_gateway and its tools into $(VENV) (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

run: setup ## JupyterLab with the sandboxed kernels; NOTEBOOKS=folder names another folder
	@echo "run: JupyterLab on a free port; choose \"Python 3 (gVisor)\" in the launcher, end with Ctrl-C"
	@exec $(BIN)/jupyter lab --no-browser --ServerApp.port=8888 --ServerApp.port_retries=100 \
	  $$(test "$$(id -u)" -ne 0 || echo --allow-root) --ServerApp.root_dir="$(NOTEBOOKS)"

test: setup lint docs ## linters, docs and all tests, JOBS=2 files at a time; TESTS=tests/wire for some only
	@sh tools/system_packages.sh "$$(command -v $(PYTHON))" test
	@$(BIN)/python tools/build_front_end.py --install
	@echo "test: pytest $(TESTS)"
	@JUPYTER_PLATFORM_DIRS=1 $(BIN)/python -m pytest --durations=20 $(or $(TESTS),$(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder))

fuzz: setup ## the property tests with examples chosen at random, N=200 times; what fails is printed with its example
	@echo "fuzz: up to $(N) rounds, until one fails"
	@round=0; while test $$round -lt $(N); do round=$$((round + 1)); JUPYTER_PLATFORM_DIRS=1 \
	  $(BIN)/python -m pytest -q -x -m hypothesis --hypothesis-profile=fuzz || exit 1; done

soak: setup ## suspend, resume, fork and kill at random, N=200 times [SEED=number] [KERNELS=4]; nothing may be lost
	@echo "soak: $(N) suspend and resume cycles on $(KERNELS) kernels at once"
	@JUPYTER_PLATFORM_DIRS=1 SANDBOX_TEST_SOAK=$(N) SANDBOX_TEST_SOAK_KERNELS=$(KERNELS) \
	  $(if $(SEED),SANDBOX_TEST_SOAK_SEED=$(SEED)) $(BIN)/python -m pytest -q tests/soak/test_soak.py

lint: $(STAMP) ## ruff, mypy --strict, the layers
	@echo "lint: ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "lint: run .venv/bin/ruff format ." >&2; exit 1; }
	@echo "lint: mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "lint: layers"
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log >&2; exit 1; }

frontend: $(STAMP) ## check and build the JupyterLab extension (needs Node); the result is committed
	@$(BIN)/python tools/build_front_end.py
	@cd labextension && npm run --silent types:check && npm run --silent lint && npm run --silent test

docs: $(STAMP) ## the manual, in docs/_build/html; a warning is an error
	@echo "docs: sphinx-build"
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

pictures: setup ## take the manual's screenshots anew, by the browser tests, into docs/pictures/
	@sh tools/system_packages.sh "$$(command -v $(PYTHON))" test
	@JUPYTER_PLATFORM_DIRS=1 SANDBOX_TEST_PICTURES=1 $(BIN)/python -m pytest -q tests/lab

bench: setup ## measure against the plain ipykernel; figures and picture in docs/
	@$(BIN)/python -m bench

clean: ## remove what make made here (not the product's data directory)
	@echo "clean: $(VENV), caches and built docs"
	@rm -rf $(VENV) docs/_build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
