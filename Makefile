# make run: both experiments. make test: both at their quick preset, then the checks and the suite.
# Each makes its virtual environment first, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test

run: $(VENV)/installed
	$(BIN)/python user_grouping_evaluation_sim/run.py
	$(BIN)/python point_in_space_sim/run.py

test: $(VENV)/installed-dev
	$(BIN)/python user_grouping_evaluation_sim/run.py --preset quick --overwrite
	$(BIN)/python point_in_space_sim/run.py --preset quick --overwrite
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
