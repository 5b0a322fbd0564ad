# make quickstart   train, prune and fine-tune a small network on made-up images (minutes on a laptop)
# make test         ruff and the whole test suite
# make kill         kill a run 20 times, resume it, compare the bits
# make tables       docs/results.md and its plots, from results/*.csv
# All make their own environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := --net gateresnet20 --dataset synthetic --bs 64 --output quickstart --logdir quickstart/runs

.PHONY: quickstart test kill tables clean

quickstart: .venv/installed
	$(BIN)/python train.py $(DEMO) --epochs 10 --lr 0.05 --overwrite
	$(BIN)/python gfbs_cifar.py $(DEMO) --epochs 5 --p 0.5 --overwrite

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

kill: .venv/installed
	$(BIN)/python tests/kill.py --kills 20

tables: .venv/installed-dev
	$(BIN)/python -m tools.results results --page docs/results.md

clean:
	rm -rf .venv quickstart .pytest_cache .ruff_cache

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
