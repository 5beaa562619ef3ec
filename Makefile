# make demo: the main job on the embedded model.  make test: the fast tests.  Both set up .venv themselves.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
LOW := $(VENV)/lowest
MUTATE := $(VENV)/mutation
MUTMUT := mutmut==3.8.1
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# what must hold on the lowest transformers; the other contract tests compare with what the newest does wrong by itself
CORE := tests/functional tests/test_edits.py tests/test_anatomy.py tests/test_grouped_query.py tests/test_rope_scaling.py \
	tests/test_layouts.py tests/test_foreign.py tests/test_record.py tests/test_architectures.py \
	tests/contract/test_revert.py tests/contract/test_neighbours.py
# on 5.0: ModernBERT chooses its attention when it is built; Qwen3-Next keeps keys in a cache of its own shape; configs
# take any value unchecked; Phi-3 with yarn generates another 18th token with its cache than without (not explained);
# MPT, Persimmon and StableLM make masks by themselves, and are refused what reads transformers' own
LOW_SKIPS := not (modernbert or qwen3_next or phi3-rope_yarn or an_edit_that_raises or mpt-alibi or mpt-flash_auto \
	or persimmon-self_extend or stablelm-self_extend)
FAST := -n $(WORKERS) -m "not full and not slow"
# the workers already fill the cores; a thread pool in each would only get in their way
QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-all test-lowest mutation lint format survey bench bench-alibi bench-relative bench-decode bench-extend check-diagnose \
	downstream peers results-grouped-query results-extend-context results-passkey results-recurrence \
	results-switch-positions clean

demo: $(VENV)/.installed
	$(BIN)/attnpatch demo --output outputs/demo

test: $(VENV)/.installed
	$(QUIET) $(BIN)/python -m pytest $(FAST)

test-all: $(VENV)/.installed
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS)

test-lowest: $(LOW)/.installed
	$(QUIET) PYTHONPATH=$(CURDIR) $(LOW)/bin/python -m pytest $(FAST) -k "$(LOW_SKIPS)" $(CORE)

# what the tests do not notice: about two hours of one core; `scripts/mutation.py --survivors` is quicker
mutation: $(MUTATE)/.installed
	$(QUIET) $(MUTATE)/bin/python scripts/mutation.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

survey: $(VENV)/.installed
	$(BIN)/python scripts/survey_architectures.py --workers $(WORKERS)

bench: $(VENV)/.installed bench-decode
	$(BIN)/python scripts/bench_apply.py

bench-decode: $(VENV)/.installed
	$(BIN)/python scripts/bench_decode.py

bench-alibi: $(VENV)/.installed
	$(BIN)/python scripts/bench_alibi.py

bench-relative: $(VENV)/.installed
	$(BIN)/python scripts/bench_relative.py

# training-free context extension against plain attention
bench-extend: $(VENV)/.installed
	$(BIN)/python scripts/bench_extend.py

# predicted against measured: half an hour on an idle core
check-diagnose: $(VENV)/.installed data/smollm2/config.json
	$(BIN)/python scripts/check_diagnose.py

# converted SmolLM2 in stock transformers, llama.cpp and vLLM; the first run makes two environments of 5 GB below $(VENV)
DOWN := outputs/downstream
DOWN_KINDS := linear yarn llama3
DOWN_PATCH ?= grouped_query:num_kv_heads=1
downstream: $(VENV)/.installed data/smollm2/config.json
	$(BIN)/attnpatch apply data/smollm2 $(DOWN)/smollm2-1-kv-head --patch $(DOWN_PATCH) --overwrite
	for kind in $(DOWN_KINDS); do $(BIN)/attnpatch apply data/smollm2 $(DOWN)/smollm2-$$kind \
		--patch rope_scaling:kind=$$kind,factor=4 --overwrite || exit 1; done
	$(BIN)/python scripts/check_downstream.py $(DOWN)/smollm2-1-kv-head $(DOWN_KINDS:%=$(DOWN)/smollm2-%) \
		--control data/smollm2 --environments $(VENV)/downstream

# the projects that patch models too, each in an environment of its own (5 GB below $(VENV)), on equal work
peers: $(VENV)/.installed data/smollm2/config.json
	$(BIN)/python scripts/compare_peers.py --environments $(VENV)/peers

# hours on two cores; the same command goes on where it was stopped
results-grouped-query: $(VENV)/.installed data/corpus/manifest.json data/smollm2/config.json
	$(BIN)/python recipes/results_grouped_query.py

# half an hour of one core, for each of the two; the same command goes on where it was stopped
results-extend-context: $(VENV)/.installed data/corpus/manifest.json
	$(BIN)/python recipes/extend_context.py

# half an hour of one core, training included
results-passkey: $(VENV)/.installed outputs/pretrain_passkey/model/config.json data/passkey/2048/a_retrieval.jsonl
	$(BIN)/python recipes/extend_context.py --config recipes/configs/extend_context_passkey.yaml

outputs/pretrain_passkey/model/config.json: | $(VENV)/.installed data/passkey/512/a_retrieval.jsonl
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain_passkey.yaml \
		$$(ls -d outputs/pretrain_passkey/checkpoints/step_* >/dev/null 2>&1 && echo --resume)

data/passkey/%/a_retrieval.jsonl: | $(VENV)/.installed
	$(BIN)/python scripts/build_retrieval.py --tokens $* --count $$((819200 / $*)) --out $(@D)

results-recurrence: $(VENV)/.installed data/corpus/manifest.json data/smollm2/config.json
	$(BIN)/python scripts/bench_recurrence.py --stream 200000 --out recipes/results/recurrence/bench.json
	for name in embedded smollm2 smollm2_sinks xl; do $(BIN)/python recipes/train_recurrent.py \
		--config recipes/configs/train_recurrent_$$name.yaml --resume || exit 1; done
	$(BIN)/python recipes/recurrence_page.py outputs/train_recurrent*/metrics.json

results-switch-positions: $(VENV)/.installed data/corpus/manifest.json outputs/pretrain_learned/model/config.json
	$(BIN)/python recipes/switch_positions.py

outputs/pretrain_learned/model/config.json: | $(VENV)/.installed data/corpus/manifest.json
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain_learned.yaml \
		$$(ls -d outputs/pretrain_learned/checkpoints/step_* >/dev/null 2>&1 && echo --resume)

data/corpus/manifest.json: | $(VENV)/.installed
	$(BIN)/python scripts/build_corpus.py

data/smollm2/config.json: | $(VENV)/.installed
	$(BIN)/python scripts/fetch_smollm2.py --out data/smollm2

clean:
	rm -rf $(VENV) $(LOW) .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned: left to itself, pip may choose a CUDA build of several GB
$(VENV)/.installed: pyproject.toml
	@echo "== 1/3 creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@echo "== 2/3 installing $(TORCH)"
	$(BIN)/python -m pip install $(TORCH)
	@echo "== 3/3 installing hf_attnpatch and its development tools"
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

$(MUTATE)/.installed: $(VENV)/.installed
	@echo "== installing $(MUTMUT), whose operators scripts/mutants.py uses"
	$(PYTHON) -m venv $(MUTATE)
	$(abspath $(BIN))/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(MUTATE)/lib/python3*/site-packages)/base.pth
	$(MUTATE)/bin/python -m pip install --quiet $(MUTMUT)
	@touch $@

# another transformers in front of the packages of $(VENV), so that torch is there once only
$(LOW)/.installed: $(VENV)/.installed
	@echo "== installing transformers $(LOWEST), the lowest that pyproject.toml declares"
	$(PYTHON) -m venv $(LOW)
	$(abspath $(BIN))/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(LOW)/lib/python3*/site-packages)/base.pth
	$(LOW)/bin/python -m pip install --quiet transformers==$(LOWEST)
	@touch $@
