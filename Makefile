# `make` lists the targets. All of them use the virtual environment .venv, and make it if need be.

PYTHON ?= python3
BIN := .venv/bin
DEMO := --net gateresnet20 --dataset synthetic --bs 64 --output quickstart

.PHONY: help quickstart test kill tables clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/installed ## train, prune and fine-tune a small network: minutes on two CPU cores, no data needed
	$(BIN)/python train.py $(DEMO) --epochs 10 --lr 0.05 --cosine --overwrite
	$(BIN)/python gfbs_cifar.py $(DEMO) --epochs 5 --p 0.5 --overwrite

test: .venv/installed-dev ## check the format and run the whole test suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

kill: .venv/installed ## kill a run 20 times, resume it each time, and compare the weights
	$(BIN)/python tests/kill.py --kills 20

tables: .venv/installed-dev ## write docs/results.md and its plots from results/*.csv
	$(BIN)/python -m tools.results results --page docs/results.md

clean: ## remove .venv, quickstart/ and caches
	rm -rf .venv quickstart .pytest_cache .ruff_cache

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	@$(BIN)/pip show --quiet torch 2>/dev/null || echo "Installing torch and the rest into .venv;" \
	    "pip says nothing meanwhile. It takes minutes, and on Linux, where torch comes with CUDA," \
	    "5.6 GB of disk. For the smaller CPU build, press Ctrl-C and see Install in README.md."
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
