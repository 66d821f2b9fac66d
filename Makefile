# The commands people type. Everything runs in .venv, which `make setup` makes from the pinned requirements.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
CONFIG ?= examples/autoawq_demo.yaml

.PHONY: setup setup-dev demo app test chaos lint bench clean

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

demo: setup
	$(RUN) -m backend run $(CONFIG) --unique

app: setup
	$(RUN) app.py

test: setup-dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# 200 jobs under random kill -9, for several minutes; the short form is one of the tests.
chaos: setup-dev
	$(RUN) -m tests.faults.chaos --jobs 200

lint: setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy backend

bench: setup-dev
	$(RUN) -m benchmarks.decode
	$(RUN) -m benchmarks.quantizers
	$(RUN) -m benchmarks.memory
	$(RUN) -m benchmarks.configurations
	$(RUN) -m benchmarks.aqlm
	$(RUN) -m benchmarks.aqlm_model
	$(RUN) -m benchmarks.jobs

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
