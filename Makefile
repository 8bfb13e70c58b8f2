# Everything from a fresh clone: `make demo`, `make test`. Each sets up what it needs, once.
#   make PYTHON=python3.12 VENV=/tmp/venv test      another interpreter, another place
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests; 0 for none (to debug).
JOBS ?= 2
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt

PACKAGES := core plugins/cpu plugins/triton plugins/bnb plugins/gptq plugins/awq plugins/quanto plugins/hqq plugins/fp8 plugins/compressed-tensors plugins/torchao plugins/gguf integrations/diffusers integrations/transformers
# Entry points, dependencies and native code are fixed at installation: install again when they change.
SOURCES := $(addsuffix /pyproject.toml,$(PACKAGES)) \
	$(shell find plugins/cpu -type f \( -name '*.c' -o -name '*.h' -o -name 'hatch_build.py' -o -name 'setup.py' -o -name 'build*.py' \) -not -path '*/tests/*' 2>/dev/null)

# transformers' tokenizers warn about forks otherwise.
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV)/.stamp-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"quantmill needs Python 3.11 or later, $(PYTHON) is {sys.version.split()[0]}; try: make PYTHON=python3.11")'
	@echo "creating $(VENV) with torch (some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) $(shell sed -n '/^torch==/p' constraints.txt)
	@touch $@

$(VENV)/.stamp-packages: $(VENV)/.stamp-torch pyproject.toml $(SOURCES)
	@echo "installing the packages of the workspace, editable, and the tools"
	$(PIP) --group dev
	$(PIP) --no-build-isolation $(addprefix -e ,$(PACKAGES))
	@touch $@

.PHONY: venv
venv: $(VENV)/.stamp-packages ## the environment: torch, packages, tools

.PHONY: demo
demo: venv ## plan, quantize, evaluate, save and reload a real small Llama
	$(PY) examples/demo.py

.PHONY: test
# Workers use all processors already: more threads in each would spin for one another's.
test: venv ## all tests of all packages, and those across them
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: lint
lint: venv ## ruff and the import contracts
	PY=$(abspath $(PY)) tools/lint.sh

.PHONY: format
format: venv ## let ruff mend and format what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: type
type: venv ## mypy, strict for the core
	PY=$(abspath $(PY)) tools/type.sh

.PHONY: dist
dist: venv ## wheels, tried in a clean environment
	PY=$(abspath $(PY)) tools/dist.sh build/dist

.PHONY: docs
docs: venv ## the documentation into site/, warnings are errors
	$(PY) -m mkdocs build --strict --quiet

.PHONY: tox
tox: venv ## each package alone in its own environment, then all checks (ENV=core,bnb picks)
	$(PY) -m tox run $(if $(ENV),-e $(ENV))

.PHONY: constraints
constraints: venv ## renew constraints.txt from the environment
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	   $(PY) -m pip freeze --all --exclude-editable | sed '/ @ /d; s/+cpu$$//' | LC_ALL=C sort -f; } > constraints.new
	@mv constraints.new constraints.txt

.PHONY: clean
clean: ## remove environments, caches and outputs of this tree
	rm -rf $(VENV) .tox build dist site out .mypy_cache .ruff_cache .pytest_cache .hypothesis
