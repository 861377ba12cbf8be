# make rollout: the main job, on real processes.   make test: everything that must hold.   Both start from nothing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/pcp2_dcp2.json
GPUS   ?= 8

# Small models on few cores: more threads than ranks only get in each other's way.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: rollout test slow kernels hosts check docs docs-site clean

# The second command runs the same prompts through the whole model, without us, and compares.
rollout: $(VENV)/.installed
	deepspeed --num_gpus $(GPUS) tools/rollout.py --config $(CONFIG)
	$(BIN)/python tools/check_rollout.py

# Files by twos, those that start processes first: while they wait for each other, others compute.
test: check
	$(BIN)/pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.installed-test
	$(BIN)/pytest -q -m slow

# FlashInfer's own kernels, interpreted; minutes of compilation the first time. Skipped, and said so, where they cannot be.
kernels: $(VENV)/.installed-test
	$(BIN)/python tests/kernels/run.py

# Jobs over two hosts: network namespaces with a virtual cable. Skipped, and said so, where they are not permitted.
hosts: $(VENV)/.installed-test
	$(BIN)/pytest -q -m slow -rs tests/hosts

# Style, types, floors.
check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Rewrite the parts of the README and of docs/ that come from code.
docs: $(VENV)/.installed
	$(BIN)/python tools/dev/docs.py

# The documentation as a site, in build/site: no host is asked for anything, when it is built or when it is read.
docs-site: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# torch first and pinned: anything else that wants "torch" is then content with it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[deepspeed]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
