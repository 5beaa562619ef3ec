# make demo: the main job on the embedded model.  make test: the fast tests.  Both set up .venv themselves, from the lock.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0
UV ?= uv==0.13.9
# every package's version; `make LOCK= ...` takes the newest that pyproject.toml allows instead
LOCK ?= constraints.txt

BIN := $(VENV)/bin
LOW := $(VENV)/lowest
MUTATE := $(VENV)/mutation
MUTMUT := mutmut==3.8.1
ATHERIS := $(VENV)/atheris
NEW := $(VENV)/newest
LOCKING := $(VENV)/locking
WRITING := $(VENV)/notebooks
DOCUMENTING := $(VENV)/docs
# the extra `docs` of pyproject.toml, without the package and its torch, and what checks a release
DOCS_TOOLS := $(shell sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ,) build twine
INSTALLED := $(VENV)/.installed$(if $(LOCK),,-unlocked)
LOCKED_PYTHONS := $(shell sed -n 's/^. for Python //p' constraints.txt)
# pip builds what comes as source (this package, too) with packages of its own choice, which obey these alone
LOCKED := $(if $(LOCK),PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK))
TRANSFORMERS := $(shell sed -n 's/.*"\(transformers>=[^"]*\)".*/\1/p' pyproject.toml)
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
VERSION := -c "from importlib.metadata import version; print(version('transformers'))"
# what must hold on the lowest and the newest transformers; the other contract tests compare with what the locked one
# does wrong by itself
CORE := tests/functional tests/test_edits.py tests/test_anatomy.py tests/test_grouped_query.py tests/test_rope_scaling.py \
	tests/test_layouts.py tests/test_foreign.py tests/test_record.py tests/test_architectures.py \
	tests/contract/test_revert.py tests/contract/test_neighbours.py
# on 5.0: ModernBERT chooses its attention when it is built; Qwen3-Next keeps keys in a cache of its own shape; configs
# take any value unchecked; MPT, Persimmon, StableLM and Falcon make masks by themselves, and are refused what reads transformers';
# granite_swa, the home of several rotary bases, came with 5.15
LOW_SKIPS := not (modernbert-masked-alibi or modernbert-masked-flash_auto or modernbert-masked-self_extend \
	or qwen3_next-rope_yarn_per_request or (the_cache_shrinks and qwen3_next) \
	or (an_edit_that_raises and (SetConfig-config.num or SetConfig-config.rope)) \
	or mpt-alibi or mpt-flash_auto or persimmon-self_extend or stablelm-self_extend or falcon-self_extend \
	or llama-rotary_some)
FAST := -n $(WORKERS) -m "not full and not slow"
# the workers already fill the cores; a thread pool in each would only get in their way
QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-all test-lowest test-newest check-releases mutation interrupt fuzz fuzz-atheris lock newest lint format survey pairs drift \
	bench bench-alibi bench-relative bench-sinks \
	bench-decode bench-extend bench-scale check-diagnose \
	downstream peers results-grouped-query results-latent results-extend-context results-passkey results-recurrence \
	results-switch-positions docs notebooks pages dist clean

demo: $(INSTALLED)
	$(BIN)/attnpatch demo --output outputs/demo

test: $(INSTALLED)
	$(QUIET) $(BIN)/python -m pytest $(FAST)

test-all: $(INSTALLED)
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS)

test-lowest: $(LOW)/.installed
	$(QUIET) PYTHONPATH=$(CURDIR) $(LOW)/bin/python -m pytest $(FAST) -k "$(LOW_SKIPS)" $(CORE)

# checkpoints written on one release load on the other, with equal logits
check-releases: $(LOW)/.installed
	rm -rf outputs/releases
	for one in $(BIN) $(LOW)/bin; do PYTHONPATH=$(CURDIR) $(QUIET) $$one/python -W ignore scripts/check_releases.py \
		write outputs/releases/$$(basename $$(dirname $$one)) || exit 1; done
	PYTHONPATH=$(CURDIR) $(QUIET) $(LOW)/bin/python -W ignore scripts/check_releases.py read outputs/releases/$(notdir $(VENV))
	PYTHONPATH=$(CURDIR) $(QUIET) $(BIN)/python -W ignore scripts/check_releases.py read outputs/releases/lowest

# the newest that the registry has today, where the lock has another one
test-newest: $(INSTALLED)
	$(call layered,$(NEW))
	$(NEW)/bin/python -m pip install --quiet --upgrade "$(TRANSFORMERS)"
	@locked=$$($(BIN)/python $(VERSION)); newest=$$($(NEW)/bin/python $(VERSION)); \
	latest=$$($(NEW)/bin/python -m pip index versions transformers 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p'); \
	test "$${latest:-$$newest}" = "$$newest" || echo "transformers $$latest is out; pyproject.toml excludes it"; \
	if [ "$$newest" = "$$locked" ]; then echo "transformers $$newest is the newest and the locked one: not run twice"; else \
	echo "== core tests on transformers $$newest (locked: $$locked)"; \
	$(QUIET) PYTHONPATH=$(CURDIR) $(NEW)/bin/python -m pytest $(FAST) $(CORE); fi

# what the tests do not notice: hours of one core; `scripts/mutation.py --survivors` asks again for what was left
mutation: $(MUTATE)/.installed
	$(QUIET) $(MUTATE)/bin/python scripts/mutation.py

# 100,000 broken inputs over every parser of files that strangers write: minutes of one core
FUZZ ?= 100000
fuzz: $(INSTALLED)
	$(QUIET) $(BIN)/python scripts/fuzz.py --inputs $(FUZZ)

# the same parsers by coverage, for as long as you like; goes on from the corpus in outputs/fuzz_atheris
FUZZ_SECONDS ?= 600
fuzz-atheris: $(ATHERIS)/.installed
	$(QUIET) HF_HUB_OFFLINE=1 $(ATHERIS)/bin/python scripts/fuzz_atheris.py --seconds $(FUZZ_SECONDS)

lock: $(LOCKING)/.installed
	$(LOCKING)/bin/python scripts/lock.py --torch $(TORCH)

# the lock with the newest of everything, and what of the things that we touch that changes in transformers
newest: $(LOCKING)/.installed
	@locked=$$(sed -n 's/^transformers==//p' constraints.txt) && \
	$(LOCKING)/bin/python scripts/lock.py --torch $(TORCH) --upgrade && \
	$(LOCKING)/bin/python scripts/upstream_changes.py $$locked $$(sed -n 's/^transformers==//p' constraints.txt)

# Ctrl-C at every line: first those that no other pair of family and patch has reached, then all of every pair (hours of one
# core); the same command goes on where it was stopped
interrupt: $(INSTALLED)
	$(QUIET) $(BIN)/python -W ignore scripts/interrupt.py --new
	$(QUIET) $(BIN)/python -W ignore scripts/interrupt.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site of hf_attnpatch/docs below outputs/docs; a broken link, a page outside the navigation or an unknown name fails.
# It reads the sources and imports nothing, so that its environment is small
docs: $(DOCUMENTING)/.installed
	$(DOCUMENTING)/bin/python scripts/pages.py --check
	NO_MKDOCS_2_WARNING=1 $(DOCUMENTING)/bin/python -m mkdocs build --strict

# every notebook from its first cell to its last, beside the script that it is a pair of
notebooks: $(WRITING)/.installed
	$(QUIET) $(WRITING)/bin/python scripts/notebooks.py

# what README, pages and drawings take from recipes/results
pages: $(INSTALLED)
	$(BIN)/python scripts/pages.py --draw

# wheel and sdist as they would be published, checked
dist: $(DOCUMENTING)/.installed
	rm -rf dist
	$(DOCUMENTING)/bin/python -m build --outdir dist .
	$(DOCUMENTING)/bin/python -m twine check --strict dist/*

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

survey: $(INSTALLED)
	$(BIN)/python scripts/survey_architectures.py --workers $(WORKERS)

# two patches on one model, in both orders, each pair held to an oracle
pairs: $(INSTALLED)
	$(QUIET) $(BIN)/python -W ignore scripts/pairs.py llama gpt2 bloom > recipes/results/pairs/README.md

# every patch on copies of transformers with a change each; the same command goes on where it was stopped
drift: $(INSTALLED)
	$(BIN)/python scripts/rehearse_drift.py --workers $(WORKERS)

bench: $(INSTALLED) bench-decode
	$(BIN)/python scripts/bench_apply.py

bench-decode: $(INSTALLED)
	$(BIN)/python scripts/bench_decode.py

# checkpoints of growing size: time and memory of `apply`; then SIGKILL at random moments of it
bench-scale: $(INSTALLED)
	$(QUIET) $(BIN)/python -W ignore scripts/bench_scale.py
	$(QUIET) $(BIN)/python -W ignore scripts/kill_apply.py

bench-alibi: $(INSTALLED)
	$(BIN)/python scripts/bench_alibi.py

bench-relative: $(INSTALLED)
	$(BIN)/python scripts/bench_relative.py

# learned sinks through a flash kernel against transformers' eager attention
bench-sinks: $(INSTALLED)
	$(BIN)/python scripts/bench_sinks.py

# training-free context extension against plain attention
bench-extend: $(INSTALLED)
	$(BIN)/python scripts/bench_extend.py

# predicted against measured: half an hour on an idle core
check-diagnose: $(INSTALLED) data/smollm2/config.json
	$(BIN)/python scripts/check_diagnose.py

# converted SmolLM2 in stock transformers, llama.cpp and vLLM; the first run makes two environments of 5 GB below $(VENV)
DOWN := outputs/downstream
DOWN_KINDS := linear yarn llama3
DOWN_PATCH ?= grouped_query:num_kv_heads=1
downstream: $(INSTALLED) data/smollm2/config.json
	$(BIN)/attnpatch apply data/smollm2 $(DOWN)/smollm2-1-kv-head --patch $(DOWN_PATCH) --overwrite
	for kind in $(DOWN_KINDS); do $(BIN)/attnpatch apply data/smollm2 $(DOWN)/smollm2-$$kind \
		--patch rope_scaling:kind=$$kind,factor=4 --overwrite || exit 1; done
	$(BIN)/python scripts/check_downstream.py $(DOWN)/smollm2-1-kv-head $(DOWN_KINDS:%=$(DOWN)/smollm2-%) \
		--control data/smollm2 --environments $(VENV)/downstream

# the projects that patch models too, each in an environment of its own (5 GB below $(VENV)), on equal work
peers: $(INSTALLED) data/smollm2/config.json
	$(BIN)/python scripts/compare_peers.py --environments $(VENV)/peers

# ten minutes of one core for each of six cells; the same command goes on where it was stopped
results-latent: $(INSTALLED)
	$(BIN)/python recipes/results_latent.py

# hours on two cores; the same command goes on where it was stopped
results-grouped-query: $(INSTALLED) data/corpus/manifest.json data/smollm2/config.json
	$(BIN)/python recipes/results_grouped_query.py

# half an hour of one core, for each of the two; the same command goes on where it was stopped
results-extend-context: $(INSTALLED) data/corpus/manifest.json
	$(BIN)/python recipes/extend_context.py

# half an hour of one core, training included
results-passkey: $(INSTALLED) outputs/pretrain_passkey/model/config.json data/passkey/2048/a_retrieval.jsonl
	$(BIN)/python recipes/extend_context.py --config recipes/configs/extend_context_passkey.yaml

outputs/pretrain_passkey/model/config.json: | $(INSTALLED) data/passkey/512/a_retrieval.jsonl
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain_passkey.yaml \
		$$(ls -d outputs/pretrain_passkey/checkpoints/step_* >/dev/null 2>&1 && echo --resume)

data/passkey/%/a_retrieval.jsonl: | $(INSTALLED)
	$(BIN)/python scripts/build_retrieval.py --tokens $* --count $$((819200 / $*)) --out $(@D)

results-recurrence: $(INSTALLED) data/corpus/manifest.json data/smollm2/config.json
	$(BIN)/python scripts/bench_recurrence.py --stream 200000 --out recipes/results/recurrence/bench.json
	for name in embedded smollm2 smollm2_sinks xl; do $(BIN)/python recipes/train_recurrent.py \
		--config recipes/configs/train_recurrent_$$name.yaml --resume || exit 1; done
	$(BIN)/python recipes/recurrence_page.py outputs/train_recurrent*/metrics.json

results-switch-positions: $(INSTALLED) data/corpus/manifest.json outputs/pretrain_learned/model/config.json
	$(BIN)/python recipes/switch_positions.py

outputs/pretrain_learned/model/config.json: | $(INSTALLED) data/corpus/manifest.json
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain_learned.yaml \
		$$(ls -d outputs/pretrain_learned/checkpoints/step_* >/dev/null 2>&1 && echo --resume)

data/corpus/manifest.json: | $(INSTALLED)
	$(BIN)/python scripts/build_corpus.py

data/smollm2/config.json: | $(INSTALLED)
	$(BIN)/python scripts/fetch_smollm2.py --out data/smollm2

clean:
	rm -rf $(VENV) $(LOW) .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned: left to itself, pip may choose a CUDA build of several GB
$(INSTALLED): pyproject.toml $(LOCK)
	@python=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1; \
	case "$(if $(LOCK), $(LOCKED_PYTHONS) , $$python )" in *" $$python "*) ;; *) \
		echo "$(LOCK) has no pins for Python $$python, only for $(LOCKED_PYTHONS). Choose one of them, as in"; \
		echo "    make PYTHON=python$(firstword $(LOCKED_PYTHONS)) $(or $(MAKECMDGOALS),demo)"; \
		echo "or go without pins, with the newest packages that pyproject.toml allows:"; \
		echo "    make LOCK= $(or $(MAKECMDGOALS),demo)"; exit 1;; esac
	@echo "== 1/3 creating $(VENV) with $$($(PYTHON) --version), $(if $(LOCK),packages as pinned in $(LOCK),no packages pinned)"
	$(PYTHON) -m venv $(VENV)
	@echo "== 2/3 installing $(TORCH)"
	$(LOCKED) $(BIN)/python -m pip install $(TORCH)
	@echo "== 3/3 installing hf_attnpatch and its development tools"
	$(LOCKED) $(BIN)/python -m pip install $(if $(LOCK),,--upgrade $(TORCH)) -e '.[dev]'
	@rm -f $(VENV)/.installed $(VENV)/.installed-unlocked
	@touch $@

# an environment in front of the packages of $(VENV), for another transformers: torch is there once only
define layered
	$(PYTHON) -m venv $(1)
	$(abspath $(BIN))/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(1)/lib/python3*/site-packages)/base.pth
endef

$(LOW)/.installed: $(INSTALLED)
	@echo "== installing transformers $(LOWEST), the lowest that pyproject.toml declares"
	$(call layered,$(LOW))
	$(LOW)/bin/python -m pip install --quiet transformers==$(LOWEST)
	@touch $@

$(MUTATE)/.installed: $(INSTALLED)
	@echo "== installing $(MUTMUT), whose operators scripts/mutants.py uses"
	$(call layered,$(MUTATE))
	$(MUTATE)/bin/python -m pip install --quiet $(MUTMUT)
	@touch $@

$(DOCUMENTING)/.installed: Makefile pyproject.toml
	$(PYTHON) -m venv $(DOCUMENTING)
	$(DOCUMENTING)/bin/python -m pip install --quiet $(DOCS_TOOLS)
	@touch $@

$(WRITING)/.installed: $(INSTALLED)
	$(call layered,$(WRITING))
	$(WRITING)/bin/python -m pip install --quiet jupytext==1.19.6 nbclient ipykernel
	@touch $@

$(ATHERIS)/.installed: $(INSTALLED)
	$(call layered,$(ATHERIS))
	$(ATHERIS)/bin/python -m pip install --quiet atheris==3.0.0
	@touch $@

$(LOCKING)/.installed: Makefile
	$(PYTHON) -m venv $(LOCKING)
	$(LOCKING)/bin/python -m pip install --quiet $(UV)
	@touch $@
