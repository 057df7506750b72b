# Every target makes .venv if it is missing; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
NEWEST ?= 2.14.1
# Processes that share the tests; sets have the same order in all of them.
WORKERS ?= 2
export PYTHONHASHSEED := 0
SHARED := -m pytest -n $(WORKERS) --dist worksteal

KERNELS := kernels-sse42 kernels-avx2 kernels-any-cpu kernels-threads

.PHONY: demo test lint release bench sweep docs clean matrix newest kernels $(KERNELS)

demo: .venv/examples
	$(BIN)/python examples/digits.py
	$(BIN)/hvpop demo -o output/hvpop-demo.html

test: .venv/dev
	$(BIN)/python $(SHARED)

# The suite under the kernels that torch, MKL, oneDNN and OpenBLAS take on other CPUs (CONTRIBUTING.md).
kernels: $(KERNELS)

$(KERNELS): .venv/dev
	$(BIN)/python $(SHARED) $(THREADS) $(TESTS)

kernels-sse42: export MKL_ENABLE_INSTRUCTIONS := SSE4_2
kernels-sse42: export ONEDNN_MAX_CPU_ISA := SSE41
kernels-sse42: export ATEN_CPU_CAPABILITY := default
kernels-sse42: export OPENBLAS_CORETYPE := Nehalem

kernels-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
kernels-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
kernels-avx2: export ATEN_CPU_CAPABILITY := avx2
kernels-avx2: export OPENBLAS_CORETYPE := Zen

kernels-any-cpu: export MKL_CBWR := COMPATIBLE
kernels-any-cpu: export ATEN_CPU_CAPABILITY := avx2
kernels-any-cpu: export OPENBLAS_CORETYPE := Haswell

kernels-threads: export MKL_CBWR := AVX2
kernels-threads: export OMP_WAIT_POLICY := passive
kernels-threads: THREADS := --threads 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On other torch, Python, NumPy and SciPy: MATRIX=2.6.0,2.13.0/python3.13 chooses (tests/matrix/run.py).
matrix: .venv/dev
	$(BIN)/python -m tests.matrix.run $(TESTS)

# The newest torch that is tested, on what differs most between releases; an environment of its own.
newest: .venv/newest/done
	.venv/newest/bin/python $(SHARED) tests/strategies tests/risk tests/zoo tests/test_torch_names.py

# Wheel and sdist, built, checked, and each installed by itself (tests/release.py).
release: .venv/dev
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tests.release dist

bench: .venv/peers
	$(BIN)/python tests/benchmarks/run.py
	$(BIN)/python tests/benchmarks/gradients.py
	$(BIN)/python tests/benchmarks/influence.py

sweep: .venv/sweep
	$(BIN)/python -m tests.sweep.run

# The site, offline, in docs/_build/html; its links are followed.
docs: .venv/dev
	$(BIN)/python -m sphinx --quiet --keep-going -W -b html docs docs/_build/html
	$(BIN)/python -m tests.site docs/_build/html

clean:
	rm -rf .venv output dist docs/_build docs/gallery

.venv/newest/done: pyproject.toml .venv/dev
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(NEWEST)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(NEWEST) -e '.[test,models]'
	touch $@

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
