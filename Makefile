# make repro   set up .venv, run the whole pipeline, write reports/report.html
# make test    set up .venv and run every test
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro test check venv lock fresh plots-page bench bench-quick elpv
repro: venv
	dvc repro
	python -m pipeline.report

test: venv
	python -m pytest

check: venv
	ruff check .
	ruff format --check .
	pyright

venv: .venv/installed

.venv/installed: requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet --requirement requirements.lock --requirement requirements-dev.lock
	python -m pip install --quiet --no-deps --editable .
	touch $@

# Pins for Linux x86-64 and Arm, macOS Arm and Windows x86-64, from pyproject.toml.
lock: venv
	uv pip compile --quiet --universal pyproject.toml --output-file requirements.lock
	uv pip compile --quiet --universal --group dev --constraint requirements.lock --output-file requirements-dev.lock

# Whether dvc.lock and the committed reports are those of the committed code, parameters and data; runs no stage.
fresh: venv
	@announced=$$(dvc repro --dry --allow-missing) && ! echo "$$announced" | grep '^Running stage' \
		|| { echo 'dvc.lock is stale: dvc repro, and commit'; exit 1; }

# The page that `dvc plots show` fills, from vl-convert; run it again when that changes.
plots-page: venv
	python -m pipeline.plots_page

# Needs what `make repro` makes.
bench: venv
	python -m benchmarks

bench-quick: venv
	python -m benchmarks --quick

# The published protocol on the default data; goes on where it stopped. Needs nothing but the environment.
elpv: venv
	python -m benchmarks.elpv
