# Everything runs in .venv, created on first use with the versions of constraints.txt.
#   make demo      the whole pipeline on a built-in synthetic set, with report.html
#   make test      lint, types and tests
#   make test-integrations   tests of torchvision, segmentation_models_pytorch, transformers, mmsegmentation and ONNX in
#                        .venv-integrations, an environment of their own
#   make compile-check   compiles the Triton and CUDA kernels for sm_80, sm_90, sm_100, without a GPU: registers, spills,
#                        shared memory, occupancy; FULL=1 takes every dtype and size, JSON=FILE also writes the table,
#                        REQUIRE_NVCC=1 fails where there is no nvcc or NVRTC instead of leaving out the CUDA kernels
#   make wheel-check     builds sdist and wheel, and passes the self-test with the wheel where there is no compiler
#   make results-cpu   the ablation ladders on ACDC and MSRC-21 and the robustness, run by run, at most 10 minutes each on
#                  two cores; DATA=DIR holds acdc_scribble and msrc21, DATASET=acdc takes one, MINUTES=M stops in between;
#                  docs/results/README.md
#   make results-gpu   the same at full size
#   make tune      the search for the weights of the losses on the validation splits; DATA, MINUTES
#   make results-docs  the pages and plots of docs/results from their JSON; README=1 also into README.md
#   make bench     every op against its baselines; OPS="slic potts" takes some, JSON=FILE also writes rows, tables, plot
#   make bench-compare   our own kernels against the committed times of this kind of processor; make bench-baseline writes
#                  them, make bench-page renews docs/benchmarks.md from the committed results
#   make peers     packages that are only benchmarked against (benchmarks/peers.txt), into .venv
#   make docs      API pages from the docstrings, build/api/index.html
#   make gpu       on a machine with a GPU, in its own Python and without a network: build, tests, compute-sanitizer and
#                  benchmarks, results in benchmarks/results; OUT=DIR, PARTS="build bench", OPS="slic potts", MINUTES=9.5,
#                  DRY_RUN=1 only prints the commands; docs/gpu.md
SHELL := /bin/bash
PYTHON ?= python3
# The folder of the data sets that results are measured on.
DATA ?= data
# Before .venv comes to the front of PATH.
MACHINE_PYTHON := $(shell command -v $(PYTHON))
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATIONS := .venv-integrations
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c constraints.txt -c constraints-integrations.txt
# ninja and the console scripts of the environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help install build demo test test-triton test-integrations docs bench bench-baseline bench-compare bench-page peers results-cpu results-gpu tune results-docs gpu compile-check wheel-check lint selftest format clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(VENV)/.installed
build: $(VENV)/.built

# torch first: the extension is built against it, and a later unpinned install would replace it.
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned versions need Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel ninja torch numpy
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py tools/host_part.py tools/nvcc.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[test]"
	touch $@

demo: build
	$(BIN)/cc4s demo --out runs/demo

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

selftest: build
	$(BIN)/python -m cc4s_kernels.info --selftest

test: lint selftest
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=40
	$(MAKE) test-triton

# A process of its own: Triton decides when a kernel is defined whether it will be interpreted.
test-triton: build
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops -m triton_interpreter -n 2

# The extension is there already; mmsegmentation's own requirements ask for a compiled mmcv.
$(INTEGRATIONS)/.installed: constraints.txt constraints-integrations.txt pyproject.toml
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS_PIP) "setuptools>=77" wheel torch numpy
	CC4S_KERNELS_SKIP_BUILD=1 $(INTEGRATIONS_PIP) --no-build-isolation -e ".[integrations]"
	$(INTEGRATIONS_PIP) --no-deps mmsegmentation mmcv-lite
	touch $@

# Warnings of other packages are not ours to fix.
test-integrations: build $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations -W ignore

compile-check: build
	$(BIN)/python -m tools.compile_check $(if $(FULL),--full) $(if $(JSON),--json $(JSON)) \
		$(if $(REQUIRE_NVCC),--require-nvcc)

# Some minutes: everything is built once more.
wheel-check: build
	$(BIN)/python -m tools.wheel_check

bench: build
	$(BIN)/python -m benchmarks.run $(foreach op,$(OPS),--op $(op)) $(if $(JSON),--json $(JSON))

# One folder for each kind of processor: times of another one say nothing.
SPEED = benchmarks/test_speed.py --benchmark-storage=file://benchmarks/results/speed/$(PROCESSOR) --benchmark-sort=name
PROCESSOR := $(shell sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -1 | tr -cs '[:alnum:]\n' -)

bench-baseline: build
	$(BIN)/python -m pytest -q -p no:xdist $(SPEED) --benchmark-save=baseline

bench-compare: build
	@ls benchmarks/results/speed/$(PROCESSOR)/*/*.json > /dev/null 2>&1 || \
		{ echo "No times of a $(PROCESSOR) in benchmarks/results/speed: make bench-baseline writes them"; exit 1; }
	$(BIN)/python -m pytest -q -p no:xdist $(SPEED) --benchmark-compare --benchmark-compare-fail=median:33%

bench-page: build
	$(BIN)/python -m benchmarks.page

peers: build
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -r benchmarks/peers.txt

docs: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pdoc
	$(BIN)/python -W error -m tools.api_pages

results-cpu: build
	$(BIN)/python -m tools.results cpu --data $(DATA) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(DATASET),--dataset $(DATASET))

results-gpu:
	$(MACHINE_PYTHON) -m tools.results gpu --data $(DATA) $(if $(MINUTES),--minutes $(MINUTES)) train.precision=bf16-mixed

tune: build
	$(BIN)/python -m tools.results tune --data $(DATA) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(DATASET),--dataset $(DATASET))

results-docs: build
	$(BIN)/python -m tools.results docs $(if $(README),--readme)

gpu:
	$(MACHINE_PYTHON) -m tools.gpu $(if $(OUT),--out $(OUT)) $(if $(PARTS),--parts $(PARTS)) $(if $(OPS),--ops $(OPS)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY_RUN),--dry-run)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info cc4s_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
