# make quickstart   train, evaluate and sample a small model on this machine
# make test         lint and run the tests
# Both create .venv first, and are safe to repeat.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: quickstart test lint clean

quickstart: .venv/installed
	$(BIN)/python train.py configs/quickstart.py
	$(BIN)/python eval.py runs/quickstart
	$(BIN)/python eval.py runs/quickstart --temperature 0.7 --max-new-tokens 120 --prompt "def main(" "The following"

test: .venv/installed lint
	$(BIN)/python -m pytest --numprocesses $(JOBS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tested versions; the project's own bounds are in pyproject.toml.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
