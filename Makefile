# mlopt: `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY = $(VENV)/bin/python
JOBS ?= $(shell n=$$(nproc); [ $$n -gt 4 ] && echo 4 || echo $$n)
CUDA_SOURCES = $(shell awk '$$1 == "cuda" {print "csrc/" $$2}' csrc/sources.txt)
NATIVE = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh) csrc/sources.txt setup.py

.PHONY: help demo test setup lint types format ctest asan tsan nvcc bench gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

demo: setup  ## train a compiled bilevel program on digits with noisy labels (2 minutes with set-up); ARGS=... passes options
	@$(PY) examples/reweighting.py $(ARGS)

test: setup  ## run the test suite; ARGS=... passes options to pytest
	@MLOPT_REQUIRE_EXTENSION=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

setup: $(VENV)/.built  ## make .venv with torch, the other packages and the extension

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "mlopt: $(PYTHON) was not found; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlopt: needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..." >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "mlopt: needs a C++ compiler; install g++ or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A torch that is already there and in range stays. The checks of setup.py and pyproject.toml run without build isolation,
# so that the extension is built against this torch and no other is downloaded.
$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@$(PY) -c 'import torch; v = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])); assert (2, 11) <= v < (2, 16)' \
	  2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q "setuptools>=77" wheel
	MLOPT_SKIP_EXTENSION=1 $(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	MAX_JOBS=$(JOBS) $(PY) setup.py -q build_ext --inplace
	@touch $@

lint: setup  ## ruff (lint, format, docstrings) and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter-out csrc/sources.txt setup.py,$(NATIVE))

types: setup  ## mypy
	$(VENV)/bin/mypy

format: setup  ## format Python and C++
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(filter-out csrc/sources.txt setup.py,$(NATIVE))

ctest:  ## C++ tests of the torch-free kernels, the CUDA ones under emulation (needs cmake)
	cmake -S . -B build/ctest -DCMAKE_BUILD_TYPE=Release
	cmake --build build/ctest --parallel $(JOBS)
	ctest --test-dir build/ctest --output-on-failure

asan:  ## the same under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/asan -DMLOPT_SANITIZE=address,undefined
	cmake --build build/asan --parallel $(JOBS)
	ctest --test-dir build/asan --output-on-failure

tsan:  ## the threaded CPU kernels under ThreadSanitizer
	cmake -S . -B build/tsan -DMLOPT_SANITIZE=thread
	cmake --build build/tsan --parallel $(JOBS)
	ctest --test-dir build/tsan --output-on-failure

nvcc:  ## compile the CUDA sources (needs nvcc, no GPU)
	@mkdir -p build/nvcc
	@for source in $(CUDA_SOURCES); do \
	  echo "nvcc $$source"; \
	  nvcc -std=c++17 -O3 -Werror all-warnings -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
	    -c $$source -o build/nvcc/$$(basename $$source).o || exit 1; \
	done

bench: setup  ## time outer iterations and kernels against their peers on this machine; writes no result
	@$(PY) -m benchmarks.run $(ARGS)
	@$(PY) benchmarks/run_vector.py --device cpu
	@$(PY) benchmarks/run_glm.py --device cpu

# Several programs fit a GPU, and compile on the CPUs.
GPU_WORKERS = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo -n 4)

gpu-check:  ## on a machine with a GPU and its own torch: build in place, test and measure everything CUDA; no network
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
	MLOPT_CUDA=1 MAX_JOBS=$$(nproc) $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. MLOPT_REQUIRE_EXTENSION=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m cuda tests $(GPU_WORKERS)
	@if command -v compute-sanitizer >/dev/null; then \
	  PYTHONPATH=. MLOPT_REQUIRE_EXTENSION=1 compute-sanitizer --error-exitcode 1 \
	    $(PYTHON) -m pytest -m cuda tests/ops -k "test_hvp or test_gd or test_cg_step or test_dot_and_norm"; fi
	PYTHONPATH=. $(PYTHON) benchmarks/run_vector.py --device cuda --out benchmarks/results
	PYTHONPATH=. $(PYTHON) benchmarks/run_glm.py --device cuda --out benchmarks/results
	PYTHONPATH=. $(PYTHON) -m benchmarks.run --device cuda --problems logistic mlp cleaning --repeats 5 --out benchmarks/results

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info demo_out mlopt/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
