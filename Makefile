# Each target does its own set-up, once: `make train` and `make test` work in a fresh clone.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Pins hold for the isolated build environment too, which `pip install -c` alone does not reach.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test check clean

train: $(INSTALLED)
	$(VENV)/bin/mpirun -n 2 $(PYTHON) examples/train_moe_lm.py --out out/train

test: $(INSTALLED)
	$(PYTHON) -m pytest

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy sparsecoll

clean:
	rm -rf build dist $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp) | $(PYTHON)
	@command -v g++ >/dev/null || { echo "make: expected a C++20 compiler, found no g++ (Debian: apt-get install g++)" >&2; exit 1; }
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[torch,mpi,solver,cli,bench,examples,dev]"
	@touch $@

$(PYTHON):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: expected python3 to be Python 3.11 or later, got $$(python3 --version 2>&1)" >&2; exit 1; }
	python3 -m venv $(VENV)
