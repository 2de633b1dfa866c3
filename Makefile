# make demo      install bloomq into .venv and stream text from the embedded model
# make test      install the test extra into .venv and run every test
# make check     format, lint and types
# make bench     the figures of the README, on this machine
# make aarch64   the backend's tests as on AArch64, under qemu, in build/aarch64
# make docs      the README's picture, and the API reference in build/api
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test check format bench aarch64 docs clean

demo: $(VENV)/.installed
	$(BIN)/bloomq generate "Once upon a time" -n 80 --temperature 0.7 --top-p 0.9 --seed 7

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p bloomq
	$(BIN)/mypy converters

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/classify.py
	$(BIN)/python benchmarks/horizon.py
	$(BIN)/python benchmarks/speculation.py

aarch64:
	.ci/aarch64 build/aarch64

$(VENV)/bin/python:
	$(PYTHON) -m venv "$(VENV)"

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch "$@"

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch "$@"

docs: $(VENV)/.installed-test
	$(BIN)/python docs/make_picture.py
	$(BIN)/python docs/make_api.py

clean:
	rm -rf "$(VENV)" build dist *.egg-info
