"""A plan says what apply does, for every patch, of a model in memory and of a folder whose weights are not loaded."""

import pytest
from architectures import tiny_model
from patches import CASES

import hf_attnpatch as ap
from hf_attnpatch.commands.models import Source
from hf_attnpatch.errors import NoWeights

FOLDERS = ("llama", "gpt2")
DEFAULTS = (  # with what is left open decided by the model
    ap.GroupedQuery(num_kv_heads=2),
    ap.GroupedQuery(num_kv_heads="auto", cache_target=0.5),
    ap.RopeScaling(kind="yarn", factor=2),
    ap.SelfExtend(),
    ap.PositionTable(length=200),
)
PATCHES = {case.name: (case.patch, dict(case.overrides)) for case in CASES}
PATCHES |= {f"default_{number}_{patch.name}": (patch, {}) for number, patch in enumerate(DEFAULTS)}


def said(verb, model, patch):
    """What a verb says of a patch, up to where apply goes on with what it found; or why it refuses."""
    try:
        return str(verb(model, patch))
    except NoWeights:
        raise
    except ap.AttnPatchError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("model_type", FOLDERS)
@pytest.mark.parametrize("name", PATCHES)
def test_a_plan_says_what_apply_does(model_type, name, tmp_path):
    patch, overrides = PATCHES[name]
    model = tiny_model(model_type, **(overrides if model_type == "llama" else {}))
    model.save_pretrained(tmp_path)
    source, kernel = Source(name=str(tmp_path)), model.config._attn_implementation
    bare, loaded = source.skeleton(), source.model()
    for each in (bare, loaded):
        each.set_attn_implementation(kernel)  # which no checkpoint keeps
    planned = said(ap.plan, model, patch)
    try:
        of_folder = said(ap.plan, bare, patch)
    except NoWeights:  # the command line loads them then
        of_folder = said(ap.plan, loaded, patch)
    assert of_folder == planned
    assert said(ap.apply, model, patch).startswith(planned)
