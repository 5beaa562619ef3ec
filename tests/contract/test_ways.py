"""A patched model runs in every way that the model ran in, or ``moot.txt`` has the words in which it is refused.

Asked of three families only, as a model is generated from a dozen times here: Llama, GPT-2 (narrow caches, a table of
positions) and BLOOM (forwards that stay).
"""

import functools

import pytest
from matrix import applicable
from outcomes import MOOT
from patches import CASES, build
from transformers import __version__

import hf_attnpatch as ap
from hf_attnpatch.invariants import WAYS, Subject
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE, PASS, _default_inputs, find

FAMILIES = ("llama", "gpt2", "bloom")
ASKED = [way for way in WAYS if not way.startswith("images")]  # tests/test_verify.py has models that take them

# Scalings of transformers that compute their angles from the length so far: keys in a cache keep others.
UPSTREAM = {
    "rope_dynamic": {"static cache, chunked prefill", "beams"},
    "rope_longrope": {"static cache, chunked prefill"},
    # flex attention of transformers on CPU, without any patch: off by the very same figure (0.0155)
    "llama+flash_flex": {"static cache, chunked prefill"},
}


def _asked(model):
    subject = Subject(model, ap.describe(model), _default_inputs(model))
    return {way: find(way, WAYS[way], subject) for way in ASKED}


@functools.lru_cache
def _unpatched(model_type, overrides):
    return _asked(build(model_type, False, next(c for c in CASES if str(c.overrides) == overrides)))


@pytest.mark.skipif(not __version__.startswith("5.24."), reason="reasons recorded on transformers 5.24.x")
@pytest.mark.parametrize(
    ("model_type", "encoder", "case"),
    [cell for cell in applicable() if cell.values[0] in FAMILIES and not cell.values[1] and not cell.marks],
)
def test_every_way_that_held_still_holds(model_type, encoder, case):
    before = _unpatched(model_type, str(case.overrides))
    model = build(model_type, encoder, case)
    ap.apply(model, case.patch)
    after = _asked(model)
    failed = {way for way in ASKED if after[way].outcome == FAIL and before[way].outcome != FAIL}
    assert failed == UPSTREAM.get(case.name, UPSTREAM.get(f"{model_type}+{case.name}", set())), after
    lost = {
        way: after[way].note for way in ASKED if after[way].outcome == NOT_APPLICABLE and before[way].outcome == PASS
    }
    known = MOOT[f"{model_type}+{case.name}"]
    assert lost.keys() == known.keys(), lost
    assert all(lost[way].startswith(why) for way, why in known.items()), lost
