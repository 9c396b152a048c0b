# Linux, Python 3.11 or newer. Everything is installed in .venv; delete it to start from scratch.
#
#   make demo                        the bundled federation
#   make install PIP_FLAGS="..."     more arguments for pip, before anything else is installed: with --extra-index-url and
#                                    the address of PyTorch's CPU wheels (pytorch.org says it), torch comes without CUDA
#   make wheel                       dist/fedmerge-VERSION-py3-none-any.whl, which is all that organisations need
PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS ?=
# One process more than cores, since deployments wait for their polls.
TOGETHER := -n $(shell expr `nproc` + 1) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=30

.PHONY: install demo test e2e deploy lint bench docs wheel

install: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.platform == "linux" else "fedmerge runs on Linux only, this is " + sys.platform)'
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fedmerge needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The bundled synthetic federation: four domains train, one is unseen. A few minutes on two cores.
demo: install
	$(BIN)/fedmerge demo

# With the setuptools that is installed, so that it needs no network.
wheel: install
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# What takes longer: whole federations in one process, Flower and Ray for real, pages in Chromium, and deployments.
e2e: install
	$(BIN)/python -m pytest -m '(federation or long or e2e or browser or deploy) and not slow' $(TOGETHER)

# Of these, deployments alone: on machines of their own (network namespaces, as root; otherwise the loopback), behind nginx.
deploy: install
	$(BIN)/python -m pytest -m deploy $(TOGETHER)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every benchmark at a size for two cores; docs/performance.md has the longer ones.
bench: install
	@set -e; for file in benchmarks/*/bench_*.py; do echo; echo "== $$file"; $(BIN)/python $$file; done

# What is written from the code: docs/config.md, tables of other pages, the keys that pyproject.toml declares to Flower.
docs: install
	$(BIN)/python -m fedmerge.report.docs.generated
