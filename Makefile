# `make demo` and `make test` are all a newcomer needs; both build their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.tested

.PHONY: demo check test test-fast test-slow lint docs format constraints clean

demo: $(STAMP)
	$(BIN)/qdeploy demo -o demo

# One thread a worker: tests run on tiny models, whose threads would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := -n auto --maxprocesses 4 --dist worksteal

# Hundreds of processes import torch; where modules are compiled anew each time, that takes longer than the tests.
unexport PYTHONDONTWRITEBYTECODE

# What a change is tried with first, in one and a half minutes.
check: $(TESTED)
	$(MAKE) --jobs 2 lint test-fast

test: lint $(TESTED)
	$(PYTEST) $(WORKERS) $(PYTEST_OPTIONS)

# Two of three tests: all that trace no graph, read none that another has traced and take less than half a second.
test-fast: $(TESTED)
	$(PYTEST) $(WORKERS) -m 'not exports and not long and not slow and not gpu' $(PYTEST_OPTIONS)

test-slow: $(TESTED)
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=7200

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m scripts.docs.prose
	$(MAKE) --no-print-directory docs

# Strict: a missing page, link or anchor is an error. The variable silences an advertisement of mkdocs-material.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs uv. After a change of dependencies; `python -m scripts.constraints --upgrade` takes the newest versions.
constraints:
	$(PYTHON) -m scripts.constraints

# torch first and separately, by its exact version: that takes the CPU build where one is offered
# instead of several GB of CUDA packages. constraints.txt pins everything that it pulls in.
# --no-compile: compiling all of their modules takes as long as the rest; Python compiles what it imports.
$(STAMP): pyproject.toml constraints.txt builtin_models/pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "qdeploy needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e builtin_models -e '.[all,dev]'
	touch $@

# Packages that only tests need. NVIDIA's TensorRT-RTX (146 MB) builds the tensorrt target's graphs on trial, without a GPU;
# Ray Serve (285 MB installed) makes pictures in two processes; Triton (190 MB) compiles the engine torch-cuda's kernels for GPUs; ncnn
# (29 MB) and LiteRT (59 MB) are engines that few install on a computer.
# On other systems than Linux x86-64 the first is empty and its tests are skipped, on others than Linux the third.
$(TESTED): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e builtin_models -e '.[tensorrt-rtx,serve-ray,torch-cuda,ncnn,litert]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
