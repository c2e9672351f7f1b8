# Everything here needs Python 3.10 or later and make; the first target that runs sets up .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench cards reproduce space clean

demo: .venv/ready ## the embedded model, end to end, offline
	$(BIN)/lmd-hf demo

test: .venv/ready ## the fast tests
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --dist worksteal

check: .venv/ready ## the slow tests, format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m slow

bench: .venv/ready ## times and memory beside peers, in one table
	$(BIN)/python benchmarks/analyze.py

cards: .venv/ready ## the reports and cards of model_cards/ again
	$(BIN)/python model_cards/make.py

reproduce: .venv/ready ## the paper's experiments, ten seeds each: half an hour
	$(BIN)/lmd-hf reproduce --all --quiet --out model_cards/experiments

space: .venv/ready ## the Gradio Space on this machine: http://127.0.0.1:7860
	GRADIO_ANALYTICS_ENABLED=False $(BIN)/python spaces_app/app.py $(FOLDERS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv lmd-demo
