"""Continuous batching: what cannot run in its paged cache says so, and what to use; what can is right."""

import copy
import pickle

import pytest
import torch
from architectures import tiny_model
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_attnpatch as ap

PROMPTS = [list(range(3, 15)), list(range(20, 26))]
OURS = {
    "alibi": ap.Alibi(),
    "relative_xl": ap.RelativeXl(),
    "self_extend": ap.SelfExtend(target_length=256),
    "attention_sinks": ap.AttentionSinks(window=16),
    "segment_recurrence": ap.SegmentRecurrence(segment_length=8, memory_length=16),
}
STOCK = {
    "grouped_query": ap.GroupedQuery(num_kv_heads=2, method="mean"),
    "rope_scaling": ap.RopeScaling(kind="yarn", factor=4),
}


@pytest.mark.parametrize("name", OURS)
def test_what_the_paged_cache_would_pass_over_is_refused(name):
    model = tiny_model("llama", max_position_embeddings=64)
    names = set(vars(model))
    report = ap.apply(model, OURS[name])
    for held in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ap.AttnPatchError, match=r"LlamaForCausalLM: .*Take model\.generate with a padded batch"):
            held.generate_batch(inputs=PROMPTS)
        with pytest.raises(ap.AttnPatchError, match="without --continuous-batching"):
            held.init_continuous_batching()
    report.revert()
    assert set(vars(model)) == names
    assert model.init_continuous_batching.__func__ is type(model).init_continuous_batching


@pytest.mark.parametrize("name", STOCK)
def test_what_stock_code_runs_gives_the_tokens_of_generate(name):
    model = tiny_model("llama", num_key_value_heads=4, max_position_embeddings=64).eval()
    ap.apply(model, STOCK[name])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    want = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=64)  # or it takes the whole memory
    given = {"generation_config": GenerationConfig(**options), "continuous_batching_config": small}
    found = model.generate_batch(inputs=PROMPTS, warmup=False, **given)
    assert sorted(out.generated_tokens for out in found.values()) == sorted(want)
