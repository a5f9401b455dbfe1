# make run: all experiments. make test: each at its quick preset, then the checks and the suite.
# make reference: the committed results again. Each makes its virtual environment first, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
GROUPING = user_grouping_evaluation_sim
SPACE = point_in_space_sim
CROWD = crowd_fine_tuning_sim

.PHONY: run test reference

run: $(VENV)/installed
	$(BIN)/python $(GROUPING)/run.py
	$(BIN)/python $(SPACE)/run.py
	$(BIN)/python $(CROWD)/run.py

test: $(VENV)/installed-dev
	$(BIN)/python $(GROUPING)/run.py --preset quick --overwrite
	$(BIN)/python $(SPACE)/run.py --preset quick --overwrite
	$(BIN)/python $(CROWD)/run.py --preset quick --overwrite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

reference: $(VENV)/installed
	$(BIN)/python $(GROUPING)/run.py --sweep --output-dir results/$(GROUPING)/reference --overwrite
	$(BIN)/python $(GROUPING)/run.py --preset paper --sweep --overwrite
	$(BIN)/python $(GROUPING)/run.py --grouping random --metric l2 --num-runs 100 --audit --output-dir results/$(GROUPING)/audit --overwrite
	$(BIN)/python $(GROUPING)/study_attribution.py
	$(BIN)/python $(GROUPING)/study_pay.py
	$(BIN)/python $(GROUPING)/study_protocol.py
	$(BIN)/python $(SPACE)/study_hyperparameters.py
	$(BIN)/python $(SPACE)/run.py --preset reference --overwrite
	$(BIN)/python $(CROWD)/study_strategies.py
	$(BIN)/python $(CROWD)/run.py --preset eight --overwrite
	$(BIN)/python $(CROWD)/run.py --preset people --overwrite
	$(BIN)/python $(CROWD)/run.py --preset reference --overwrite

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
