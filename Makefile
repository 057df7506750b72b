# Every target makes .venv if it is missing; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench docs clean

demo: .venv/examples
	$(BIN)/python examples/digits.py

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/peers
	$(BIN)/python tests/benchmarks/run.py

docs: .venv/dev
	$(BIN)/python -m pytest tests/test_documentation.py

clean:
	rm -rf .venv output

# Markers of what is installed: each is made again when the requirements change.
.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(*F)]'
	touch $@

# No extra can say --no-deps, without which the peers would replace torch.
.venv/peers: .venv/bench tests/benchmarks/requirements.txt tests/benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r tests/benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r tests/benchmarks/peers.txt
	touch $@
