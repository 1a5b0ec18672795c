# Each target sets up what it needs. `make setup` is quick once it has run: it depends on the lock alone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements-cpu.lock
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PYTHONSAFEPATH := 1

.PHONY: setup serve test explore fuzz test-avx2 check fix bench bench-dtype bench-numerics bench-scoring bench-transforms bench-infalign bench-guides bench-quality bench-load bench-commits bench-hostile bench-kernels-compile clean

setup: $(READY)
	@$(BIN)/guiderail models smollm2-135m-instruct >/dev/null

$(READY): $(LOCK) pyproject.toml
	@echo "guiderail: installing into $(VENV) (once, 5 minutes or more on a small machine)" >&2
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -P deploy/install.py $(LOCK)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

serve: setup
	@$(BIN)/guiderail serve $(ARGS)

test: setup
	@$(BIN)/pytest $(ARGS)

# Property tests with new random examples each time; what they find becomes an @example of its test.
explore: setup
	@HYPOTHESIS_PROFILE=explore $(BIN)/pytest -p no:cacheprovider $(or $(ARGS),tests/theory tests/guides)

# Asks every route of a scripted server 20,000 things; ARGS="-n 2000 --real" asks one with its engine.
fuzz: setup
	@$(BIN)/python -P tests/bench/fuzz_routes.py $(ARGS)

# The same tests as on a processor without AVX-512, whatever this one is: see tests/support/avx2/sitecustomize.py.
test-avx2: setup
	@PYTHONPATH=tests/support/avx2 $(BIN)/pytest $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/test_layout.py

fix: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@$(BIN)/python -P tests/bench/bench_server.py $(ARGS)
	@$(BIN)/python -P tests/bench/bench_peers.py $(ARGS)
	@$(BIN)/python -P tests/bench/bench_numerics.py --part invariance $(ARGS)

bench-numerics: setup
	@$(BIN)/python -P tests/bench/bench_numerics.py $(ARGS)

bench-dtype: setup
	@$(BIN)/python -P tests/bench/bench_dtype.py $(ARGS)

bench-scoring: setup
	@$(BIN)/python -P tests/bench/bench_scoring.py $(ARGS)
	@$(BIN)/python -P tests/bench/bench_reward_serving.py $(ARGS)

bench-transforms: setup
	@$(BIN)/python -P tests/bench/bench_transforms.py $(ARGS)

bench-infalign: setup
	@$(BIN)/python -P tests/bench/bench_infalign.py $(ARGS)

bench-guides: setup
	@$(BIN)/python -P tests/bench/bench_guides.py $(ARGS)

bench-quality: setup
	@$(BIN)/python -P tests/bench/bench_quality.py $(ARGS)

bench-load: setup
	@$(BIN)/python -P tests/bench/bench_load.py $(ARGS)

bench-commits: setup
	@$(BIN)/python -P tests/bench/bench_commits.py $(ARGS)

bench-hostile: setup
	@$(BIN)/python -P tests/bench/bench_hostile.py $(ARGS)

bench-kernels-compile: setup
	@$(BIN)/python -P tests/bench/bench_kernels_compile.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
