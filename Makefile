# `make demo` and `make test` set themselves up on a fresh machine; everything lives in .venv.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export BAYESPASS_DATA ?= ../shared/data

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow-test lint format benchmark-demo benchmark-zoo benchmark-real-weights benchmark-cost benchmark-training benchmark-post-hoc benchmark-fidelity coverage-page clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with the pinned CPU build of torch and everything else.

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bayespass needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $(READY)

demo: $(READY) ## Train, get a posterior, predict in one pass, compare with Monte Carlo, write output/demo/report.html.
	$(BIN)/bayespass demo

test: $(READY) ## Run the tests, on two cores.
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow-test: $(READY) ## Run the tests that take minutes.
	$(BIN)/python -m pytest -m slow

lint: $(READY) ## Check style, types and hooks.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY) ## Fix what style checks can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark-demo: $(READY) ## Run the demo's comparison over six seeds (15 minutes); writes benchmarks/results/demo.json, the picture and the table of the README.
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/readme.py

benchmark-zoo: $(READY) ## Run every model of the zoo against Monte Carlo (10 minutes); writes benchmarks/results/zoo.json and docs/coverage.md.
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/coverage_page.py

benchmark-real-weights: $(READY) ## ResNet-20 on CIFAR-10 and MiniLM on SST-2 from BAYESPASS_DATA; writes benchmarks/results/real_weights.json.
	$(BIN)/python benchmarks/real_weights.py

benchmark-cost: $(READY) ## How well `bayespass inspect` predicts costs (2 minutes, on an idle machine); writes benchmarks/results/cost.json.
	$(BIN)/python benchmarks/cost.py

benchmark-training: $(READY) ## Every training method on images, UCI sets, forecasts (an hour, resumable); writes benchmarks/results/trained_posteriors.json and the tables of docs/training.md.
	$(BIN)/python benchmarks/trained_posteriors.py
	$(BIN)/python benchmarks/training_tables.py

benchmark-post-hoc: $(READY) ## Posteriors after training: solvers, OOD, cost, a VAE, laplace-torch (40 minutes, resumable; BAYESPASS_PEERS_PYTHON names its environment); writes benchmarks/results/post_hoc.json and docs/post_hoc.md.
	$(BIN)/python benchmarks/post_hoc.py
	$(BIN)/python benchmarks/post_hoc_pages.py

benchmark-fidelity: $(READY) ## Every predictor against Monte Carlo on the same posteriors, nine tasks (hours on two cores, resumable); writes benchmarks/results/fidelity.json and the tables of docs/fidelity.md.
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 $(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/fidelity_pages.py

coverage-page: $(READY) ## Make docs/coverage.md from the registry and benchmarks/results/zoo.json.
	$(BIN)/python benchmarks/coverage_page.py

clean: ## Remove the environment and every output.
	rm -rf $(VENV) output
