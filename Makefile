# Everything works from a fresh clone: the first target that needs it makes .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-slow zoo browser format clean

demo: $(VENV)/demo-installed
	$(BIN)/gradscope demo

test: $(VENV)/dev-installed browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	# Whole files: what a file starts, as processes that train together, it starts once.
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# What `make test` runs a part of: all repaired trainings, four processes that agree.
test-slow: $(VENV)/dev-installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m slow

# How often the right cause leads, over all of the zoo and five seeds: a night.
zoo: $(VENV)/dev-installed
	$(BIN)/python -m benchmarks.detection --half all --seeds 5 --generated 15

# The report's pages are tested in a browser.
browser:
	@test -n "$$CHROMIUM" || command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
		test "$$(id -u)" = 0 && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; \
	} || { echo "The browser tests need Chromium: sudo apt-get install chromium" >&2; exit 1; }

format: $(VENV)/dev-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
