# `make plan` and `make test` set up what they need on a fresh machine, then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: plan test check app figures format clean

plan: $(VENV)/.light
	@$(BIN)/planner demo

test: $(VENV)/.full
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake notebooks/*.ipynb

check: $(VENV)/.full
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/basedpyright && $(BIN)/lint-imports && $(BIN)/codespell

app: $(VENV)/.full
	$(BIN)/streamlit run app.py

figures: $(VENV)/.full
	$(BIN)/python -m planner.ui.pictures docs/images

format: $(VENV)/.full
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.light: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up (once)..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.full: pyproject.toml requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt --editable .
	@touch $@ $(VENV)/.light
