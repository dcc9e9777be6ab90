# Each target does its own set-up, once: `make train` and `make test` work in a fresh clone.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# A PYTHON from the command line is somebody else's environment, in which nothing is installed.
SET_UP := $(if $(filter command,$(origin PYTHON)),,$(INSTALLED))
# Pins hold for the isolated build environment too, which `pip install -c` alone does not reach.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test test-gpu test-multigpu check clean

train: $(INSTALLED)
	$(VENV)/bin/mpirun -n 2 $(PYTHON) examples/train_moe_lm.py --out out/train

test: $(SET_UP)
	$(PYTHON) -m pytest

# All that one GPU can tell; skipped with reasons where there is none. `make test-gpu PYTHON=python3` installs nothing.
test-gpu: $(SET_UP)
	$(PYTHON) -m pytest tests/gpu

# One rank on each of up to eight GPUs: the same checks, and nccl-tests' tables over their links.
test-multigpu: NUM_GPUS = $(shell $(PYTHON) -c "from tests.gpu.machine import num_gpus; print(min(8, num_gpus()))")
test-multigpu: $(SET_UP)
	@$(PYTHON) -m tests.gpu.machine 2
	$(PYTHON) -m pytest tests/gpu -k test_one_rank_per_gpu
	for case in all_gather reduce_scatter all_to_all; do \
		$(PYTHON) -m bench $$case --backend nccl --ranks $(NUM_GPUS) -b 1M -e 1G -f 4 || exit 1; \
	done

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy sparsecoll

clean:
	rm -rf build dist $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.cu csrc/*.cuh) | $(PYTHON)
	@command -v g++ >/dev/null || { echo "make: expected a C++20 compiler, found no g++ (Debian: apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[torch,mpi,solver,cli,bench,examples,dev]"
	@touch $@

$(PYTHON):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: expected python3 to be Python 3.11 or later, got $$(python3 --version 2>&1)" >&2; exit 1; }
	python3 -m venv $(VENV)
