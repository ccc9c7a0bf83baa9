# make repro        set up .venv, run the whole pipeline, write reports/report.html
# make first-look   a first answer in minutes: heads, advice and a page, in first-look/
# make test         set up .venv and run every test
# make test-fast    … those that take up to a second and a half: no dvc repro, no browser, no zoo of architectures
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
RUN_LOCKS := requirements.lock requirements-compare.lock requirements-report.lock requirements-export.lock
LOCKS := $(RUN_LOCKS) requirements-dev.lock
# The tests of a file run in one process: what they share is made once. In their order, in which the longest come first
PYTEST := python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

.PHONY: repro first-look test test-fast check venv lock fresh bench bench-quick elpv
# DVC promises no order among independent stages: `plan` first, so that a wrong name fails in seconds, then the advice
repro: venv
	dvc repro plan
	python -m pipeline advise --no-cost
	dvc repro
	python -m pipeline report

# Leaves everything else as it is
first-look: venv
	python -m pipeline first-look

test: venv
	$(PYTEST)

test-fast: venv
	$(PYTEST) -m 'not (architectures or browser or end_to_end or slow)'

check: venv
	ruff check .
	ruff format --check .
	pyright

venv: .venv/installed

# Also writes the page that `dvc plots show` fills, which holds the libraries of vl-convert
.venv/installed: $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet $(LOCKS:%=--requirement %)
	python -m pip install --quiet --no-deps --editable .
	python -m pipeline plots-page
	touch $@

# Pins for Linux x86-64 and Arm, macOS Arm and Windows x86-64, from pyproject.toml. A package that several locks name
# has one version in all of them.
COMPILE := uv pip compile --quiet --universal
lock: venv
	$(COMPILE) pyproject.toml --output-file requirements.lock
	$(COMPILE) --group compare --constraint requirements.lock --output-file requirements-compare.lock
	$(COMPILE) --group report --constraint requirements.lock --constraint requirements-compare.lock --output-file requirements-report.lock
	$(COMPILE) --group export --constraint requirements.lock --constraint requirements-compare.lock --constraint requirements-report.lock --output-file requirements-export.lock
	$(COMPILE) --group dev $(RUN_LOCKS:%=--constraint %) --output-file requirements-dev.lock

# Whether dvc.lock and the committed reports are those of the committed code, parameters and data; runs no stage.
fresh: venv
	@announced=$$(dvc repro --dry --allow-missing) && ! echo "$$announced" | grep '^Running stage' \
		|| { echo 'dvc.lock is stale: dvc repro, and commit'; exit 1; }

# Needs what `make repro` makes.
bench: venv
	TQDM_DISABLE=1 python -m benchmarks

bench-quick: venv
	TQDM_DISABLE=1 python -m benchmarks --quick

# The published protocol on the default data; goes on where it stopped. Needs nothing but the environment.
elpv: venv
	python -m benchmarks.elpv
