# The two commands of the README: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
RECIPE ?= recipes/customer-service.yaml
OUT ?= runs/cs
export HF_HUB_OFFLINE = 1

.PHONY: demo fetch test lint docs install install-dev clean

demo: install fetch
	$(BIN)/seodang run $(RECIPE) --out $(OUT)

fetch: install
	$(BIN)/seodang fetch $(RECIPE)

test: install-dev fetch
	$(BIN)/python -m pytest

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install-dev
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first: its CPU build satisfies whatever asks for torch later.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Seodang needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $$(grep '^torch==' constraints.txt)
	$(PIP) install -c constraints.txt -e '.[serve]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[serve,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs site
