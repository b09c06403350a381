# Each target sets up what it needs in .venv, on a machine that has nothing but Python 3.11 or newer.

PYTHON ?= python3
# Where else to look for torch, such as https://download.pytorch.org/whl/cpu for the small build without CUDA.
TORCH_INDEX ?=
# Which benchmark, with its flags.
BENCH ?= train --quick

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help demo test test-all lint bench clean

help:
	@echo "make demo      from plain text to a model that talks, served with its page (DEMO_SERVE=0: all but serving)"
	@echo "make test      style, types, the direction of imports, and the tests"
	@echo "make test-all  the same with the slow tests, and those that need a GPU or other software where it is there"
	@echo "make lint      style, types and the direction of imports"
	@echo "make bench     what training costs here, side by side with transformers (ten minutes; BENCH=... chooses)"
	@echo "make clean     forget .venv and every cache"
	@echo
	@echo "PYTHON=python3.12 chooses the Python. TORCH_INDEX=URL is one more place to look for torch."

demo: .venv/.demo-ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: lint
	$(PYTEST) --cov --cov-fail-under=85

test-all: lint
	$(PYTEST) -m "" --cov --cov-fail-under=85

lint: .venv/.test-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.bench-ready
	$(BIN)/minga bench $(BENCH)

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* htmlcov build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch alone comes first: it is most of the download, and the only package that TORCH_INDEX speaks of.
.venv/.torch-ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: minga needs Python 3.11 or newer ($(PYTHON): $$($(PYTHON) -V 2>/dev/null || echo not found))." \
	         "install one, or name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "set-up: a Python environment in .venv, and torch (some minutes the first time)"
	@$(PYTHON) -m venv .venv || { \
	    echo "error: $(PYTHON) cannot make a virtual environment. install what is missing: apt install python3-venv" >&2; \
	    rm -rf .venv; exit 1; }
	@$(PIP) '$(TORCH)' $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')
	@touch $@

.venv/.demo-ready: .venv/.torch-ready
	@echo "set-up: minga and what it runs on"
	@$(PIP) -e '.[serve]'
	@touch $@

.venv/.bench-ready: .venv/.torch-ready
	@echo "set-up: minga and the software it is compared with"
	@$(PIP) -e . 'transformers==5.23.0'
	@touch $@

.venv/.test-ready: .venv/.torch-ready
	@echo "set-up: minga and what its tests need"
	@$(PIP) -e '.[dev]'
	@touch $@
