# Everything a newcomer needs: `make demo`, `make test`. Both make .venv first; `make kernels` makes its own, and
# `make clients` one over it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# two cores spin badly when every thread pool busy-waits
QUIET  := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
BESIDE := --numprocesses=auto --maxprocesses=4
# a file's tests stay together: they share models, and some write a page of docs/. tests/conftest.py says which go first
BY_FILE := $(BESIDE) --dist=loadfile --no-loadscope-reorder
# compiled when imported: most modules never are, and pip would compile them all
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

# the Triton that CUDA builds of the oldest torch we support bring
KERNELS_VENV  := .venv-kernels
KERNELS_STAMP := $(KERNELS_VENV)/installed

# clients that want other versions of openai, huggingface_hub and rich than we do: those lie before .venv's, all else is there
CLIENTS_VENV  := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/installed

.PHONY: demo test lint bench docs kernels clients clean

demo: $(STAMP)
	$(BIN)/aiolora demo

# the kernels a second time for a machine without a GPU: in Triton's interpreter, which is chosen when Triton is imported
test: $(STAMP) lint
	$(QUIET) $(BIN)/python -m pytest $(BY_FILE)
	TRITON_INTERPRET=1 $(QUIET) $(BIN)/python -m pytest $(BESIDE) --dist=worksteal tests/kernels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cpu

# the site of docs/, in site/
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open site/index.html"

# what the kernels become on Hopper, GPU or not
kernels: $(KERNELS_STAMP)
	PYTHONPATH=src $(KERNELS_VENV)/bin/python -m tests.kernels.aot

# openai, litellm, langchain-openai, instructor and guidellm against a real server
clients: $(CLIENTS_STAMP)
	$(QUIET) $(CLIENTS_VENV)/bin/python -m pytest $(BY_FILE) tests/clients

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

$(KERNELS_STAMP): Makefile constraints.txt
	$(PYTHON) -m venv $(KERNELS_VENV)
	$(KERNELS_VENV)/bin/python $(INSTALL) --constraint constraints.txt "torch==2.13.0" numpy msgspec
	$(KERNELS_VENV)/bin/python $(INSTALL) --no-deps "triton==3.6.0"
	touch $(KERNELS_STAMP)

$(CLIENTS_STAMP): $(STAMP) tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	ls -d $(abspath $(VENV))/lib/python3.*/site-packages > $$(ls -d $(CLIENTS_VENV)/lib/python3.*/site-packages)/behind.pth
	$(CLIENTS_VENV)/bin/python $(INSTALL) --constraint tests/clients/constraints.txt --editable ".[clients]"
	touch $(CLIENTS_STAMP)

clean:
	rm -rf $(VENV) $(KERNELS_VENV) $(CLIENTS_VENV) build dist site .mypy_cache .ruff_cache .pytest_cache
