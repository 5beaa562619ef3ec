# make demo: the main job on the embedded model.  make test: the fast tests.  Both set up .venv themselves.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# short runs on few cores are faster without nested thread pools
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test test-all test-core lint format survey bench clean

demo: $(STAMP)
	$(BIN)/attnpatch demo --output outputs/demo

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not full and not slow"

test-all: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

survey: $(STAMP)
	$(BIN)/python scripts/survey_architectures.py

bench: $(STAMP)
	$(BIN)/python scripts/bench_apply.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned: on Linux without a pin pip may choose a CUDA build of several GB
$(STAMP): pyproject.toml
	@echo "== 1/3 creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@echo "== 2/3 installing $(TORCH) (about 200 MB)"
	$(BIN)/python -m pip install --progress-bar on $(TORCH)
	@echo "== 3/3 installing hf_attnpatch and its development tools"
	$(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	@touch $@
