# The two commands: `make demo` and `make test`. Each does its own set-up in .venv, with the pinned versions of constraints.txt.
PYTHON ?= python3
# PyTorch's own index of CPU builds, for machines where plain `pip install torch` would fetch gigabytes of CUDA:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
OUT ?= runs/demo
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ALL := dev,search,detect,video,app,milvus,ray,onnx,peft,hub
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-full setup lock docs nbs notebook readme address check clean

help:
	@echo "make demo       train a retriever on the embedded benchmark and write $(OUT)/index.html"
	@echo "make test       notebooks (nbdev_test), library, README in step; all quick tests"
	@echo "make test-full  the same and the long tests: kills, faults, several processes"
	@echo "make setup      everything installed in $(VENV), nothing run"
	@echo "make nbs        run all notebooks in place and keep their outputs (FLAGS=slow,gpu adds flagged cells)"
	@echo "make notebook NB=nbs/05_methods/08_cmt.ipynb   the whole round of a changed notebook: export, run, export again, README and llms.txt"
	@echo "make docs       build the site with Quarto into _docs (without Quarto: process the notebooks only)"
	@echo "make readme     README.md from nbs/index.ipynb and nbs/llms.txt from all;  make lock: constraints.txt anew;  make clean"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first, by its exact version: whatever asks for torch later finds it there and fetches nothing.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) install -q $$(grep -E '^(torch|setuptools|numpy|pip|wheel)==' constraints.txt) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(ALL)]'
	@touch $@ $(VENV)/.core

setup: $(VENV)/.dev

demo: $(VENV)/.core
	$(BIN)/tipr demo --out $(OUT)

check: $(VENV)/.dev
	$(BIN)/python scripts/check_sync.py

test: $(VENV)/.dev
	$(BIN)/python scripts/check_sync.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TIPR_QUIET=1 timeout 1500 $(BIN)/nbdev_test --n_workers $(WORKERS)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TIPR_QUIET=1 $(BIN)/python -m pytest tests -n $(WORKERS) -m "not full"

test-full: test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TIPR_QUIET=1 $(BIN)/python -m pytest tests -m full --timeout 3600

nbs: $(VENV)/.dev
	$(BIN)/python scripts/run_nbs.py nbs $(if $(FLAGS),--flags $(FLAGS))

# Running a notebook renames its cells, which stand in the exported module, so it is exported before and after.
notebook: $(VENV)/.dev
	@test -n "$(NB)" || { echo "name the notebook: make notebook NB=nbs/05_methods/08_cmt.ipynb (several in quotes)"; exit 2; }
	$(BIN)/nbdev_export
	$(BIN)/python scripts/run_nbs.py $(NB) $(if $(FLAGS),--flags $(FLAGS))
	$(BIN)/nbdev_export
	$(BIN)/python scripts/make_readme.py
	$(BIN)/python scripts/make_llms.py
	$(BIN)/python scripts/check_sync.py

readme: $(VENV)/.dev
	$(BIN)/python scripts/make_readme.py
	$(BIN)/python scripts/make_llms.py

# The repository's address, everywhere: make address GIT=https://github.com/OWNER/NAME DOCS=https://OWNER.github.io/NAME
address: $(VENV)/.dev
	$(BIN)/python scripts/set_address.py $(if $(GIT),--git $(GIT)) $(if $(DOCS),--docs $(DOCS))

docs: $(VENV)/.dev
	$(BIN)/python scripts/make_docs.py

# All pins anew: the newest versions that pyproject.toml allows, resolved in an empty environment.
lock:
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install -q torch==2.13.0 torchvision==0.28.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(VENV)-lock/bin/python -m pip install -q --upgrade pip setuptools wheel
	$(VENV)-lock/bin/python -m pip install -q '.[$(ALL)]'
	$(VENV)-lock/bin/python scripts/lock.py > constraints.txt.new && mv constraints.txt.new constraints.txt
	rm -rf $(VENV)-lock

clean:
	rm -rf _proc _docs build dist *.egg-info nbs/nbdev.yml nbs/sidebar.yml nbs/_quarto.yml .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
