# Every target prepares what it needs, on a fresh machine that has Python 3.11 and a C++ compiler (DeepSpeed compiles
# one small extension). pip's own configuration and PIP_* variables decide where packages come from.

PYTHON ?= $(shell command -v python3.11 || command -v python3)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
READY_BENCH := $(VENV)/ready-bench
DEEPSPEED := $(shell sed -n 's/^deepspeed==//p' constraints.txt)
EXTENSIONS := $(CURDIR)/.cache/torch-extensions/deepspeed-$(DEEPSPEED)
WARM := $(EXTENSIONS)/warm
COPY_LIBRARY := client/cairn/capture/libcairncopy.so
PIP_INSTALL := $(PY) -m pip install --quiet --constraint constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo test test-faults prove fault-tools bench lint proto clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(WARM) $(COPY_LIBRARY)  ## train with DeepSpeed on CPU, kill it, resume from memory, disk and bucket; compares the weights
	$(PY) -m tests.e2e.demo

test: $(WARM) $(COPY_LIBRARY)  ## all tests but the fault injection (under 15 minutes)
	$(PY) -m pytest tests -m "not fault" --ignore=tests/crash --ignore=tests/simulation --durations=10

# What each test found is collected, printed as a table of promises, and by `make prove` written into the README.
FAULT_TESTS = $(PY) -m pytest $(PATIENT) tests/crash tests/simulation tests/hostile --durations=10 \
  && $(PY) -m pytest $(PATIENT) tests -m fault --ignore=tests/crash --ignore=tests/simulation --ignore=tests/hostile --durations=10

test-faults: $(WARM) $(COPY_LIBRARY) fault-tools  ## crash, power-cut and fault tests, sized down; without root some skip, and say so
	@$(PY) -m tests.promises --forget
	$(FAULT_TESTS)
	@$(PY) -m tests.promises

prove: PATIENT = -o faulthandler_timeout=0
prove: $(WARM) $(COPY_LIBRARY) fault-tools  ## the same in full (about two hours); writes the table of promises into the README
	@$(PY) -m tests.promises --forget
	CAIRN_PROOF=full; export CAIRN_PROOF; { $(FAULT_TESTS); } && status=0 || status=$$?; \
	  $(PY) -m tests.promises --readme; exit $$status

# BENCH takes its flags: make bench BENCH="--states adam --ranks 1,2"; all of them: make bench BENCH=--help
bench: $(READY_BENCH) $(COPY_LIBRARY)  ## stall, drain and restore, against other engines and the machine's floors
	$(PY) -m tests.perf $(BENCH)

lint: $(READY)  ## style, types, fresh generated code
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) proto/generate.py --check

proto: $(READY)  ## make the Python code from the protos
	$(PY) proto/generate.py

clean:  ## remove everything that make made
	rm -rf $(VENV) $(COPY_LIBRARY) .cache build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that DeepSpeed and the project find it and cannot choose another. The install is
# editable: the sources are used as they stand, and only changed metadata (entry points!) makes it run again.
$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Cairn needs Python 3.11 or newer. Next step: make PYTHON=/path/to/python3.11")'
	@echo "Preparing $(VENV) (a minute when the packages are at hand)"
	@test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	@$(PIP_INSTALL) torch setuptools wheel
	@DS_BUILD_OPS=0 $(PIP_INSTALL) deepspeed
	@$(PIP_INSTALL) --editable '.[client,daemon,deepspeed,dev]'
	@touch $@

# What the benchmark compares with, on top of the above; the tests do without.
$(READY_BENCH): $(READY)
	@$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

# The install above compiles it too; this is for a change of its source. Without a compiler there is none, and it says so.
$(COPY_LIBRARY): $(wildcard client/cairn/capture/*.[ch]) hatch_build.py | $(READY)
	@$(PY) hatch_build.py

# DeepSpeed compiles its CPU communication extension on first use. A process that is killed meanwhile leaves a lock for
# which all later ones wait for ever, and the tests kill processes: so it is compiled once, here, in a folder of ours.
# Cairn's own hook in `import torch` is switched off: what is prepared here must not depend on the code under test.
export TORCH_EXTENSIONS_DIR := $(EXTENSIONS)
$(WARM): $(READY)
	@echo "Compiling DeepSpeed's CPU extension (half a minute, once)"
	@rm -rf $(EXTENSIONS)
	@mkdir -p $(EXTENSIONS)
	@DS_ACCELERATOR=cpu TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	  $(PY) -m torch.distributed.run --standalone --nproc_per_node 1 --no-python \
	  $(PY) -c 'import deepspeed; deepspeed.init_distributed("gloo"); deepspeed.comm.destroy_process_group()' \
	  > $(EXTENSIONS)/compile.log 2>&1 || { cat $(EXTENSIONS)/compile.log; exit 1; }
	@touch $@

# Without these commands the tests that need them skip and say so.
fault-tools:
	@missing=""; \
	for pair in mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs strace:strace unzip:unzip faketime:faketime; do \
	  command -v "$${pair%%:*}" > /dev/null || missing+=" $${pair##*:}"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then \
	  echo "Installing$$missing"; \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing > /dev/null; } \
	    || echo "Could not install$$missing: tests that need them will be skipped" >&2; \
	else \
	  echo "Missing$$missing, and not root on Debian: tests that need them will be skipped" >&2; \
	fi
