# Everything installs itself into .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test test-engines lint format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(RUN)/niwaki demo --overwrite

test: $(VENV)/.installed
	$(RUN)/python -m pytest -m "not engines"

# llama-cpp-python is built from source, once: some minutes, and a C++ compiler.
$(VENV)/.engines: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,engines]"
	touch $@

test-engines: $(VENV)/.engines
	$(RUN)/python -m pytest -m engines

lint: $(VENV)/.installed
	$(RUN)/ruff check src tests benchmarks
	$(RUN)/ruff format --check src tests
	$(RUN)/mypy

format: $(VENV)/.installed
	$(RUN)/ruff check --fix src tests benchmarks
	$(RUN)/ruff format src tests

clean:
	rm -rf $(VENV) niwaki-demo niwaki-demo-*.jsonl
