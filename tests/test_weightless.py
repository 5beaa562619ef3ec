"""A record holds what a user chose; how keys turn is found again by running a model that has no weights yet."""

import json
import re
import warnings

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch import patches
from hf_attnpatch.anatomy import describe
from hf_attnpatch.modules.added import CountedOnly
from hf_attnpatch.patch import internal_fields
from hf_attnpatch.recurrence.survey import ways
from hf_attnpatch.spans.survey import survey
from hf_attnpatch.weightless import weightless

SPAN = {"trained": 64}
MEMORY = ap.SegmentRecurrence(segment_length=8, memory_length=16)
# patch -> a family that it is made for; every patch that is recorded
CHOSEN = {
    "grouped_query": ("gpt2", ap.GroupedQuery(num_kv_heads=2)),
    "rope_scaling": ("llama", ap.RopeScaling(kind="dynamic_yarn", factor=2.0, per_request=True)),
    "alibi": ("llama", ap.Alibi()),
    "relative_xl": ("llama", ap.RelativeXl(size=32)),
    "rotary": ("gpt_neo", ap.Rotary(theta=500.0)),
    "sinusoidal": ("gpt2", ap.Sinusoidal(amplitude=0.5)),
    "no_position": ("gpt2", ap.NoPosition()),
    "score_temperature": ("llama", ap.ScoreTemperature(slope=0.3, step=8)),
    "windowed": ("llama", ap.Windowed(window=8)),
    "latent": ("llama", ap.Latent()),
    "position_table": ("llama", ap.PositionTable(length=256)),
    "self_extend": ("llama", ap.SelfExtend(window=16, group=4, **SPAN)),
    "dual_chunk": ("gpt_neox", ap.DualChunk(chunk=32, **SPAN)),
    "re_rope": ("cohere", ap.ReRope(window=16, **SPAN)),
    "jet_long": ("gemma3_text", ap.JetLong(window=16, **SPAN)),
    "attention_sinks": ("mixtral", ap.AttentionSinks(num_sinks=2, window=16, **SPAN)),
    "segment_recurrence": ("gptj", MEMORY),
}
INTERNAL = {field for cls in map(patches.__dict__.get, patches.__all__) for field in internal_fields(cls)}
FOUND = {"found", "turning", "counted", *INTERNAL}


def test_every_patch_that_is_recorded_is_here():
    recorded = {cls.name for cls in map(patches.__dict__.get, patches.__all__) if cls.recorded}
    assert set(CHOSEN) == recorded


@pytest.mark.parametrize("name", CHOSEN)
def test_configs_and_reports_hold_what_a_user_chose(name, tmp_path):
    family, patch = CHOSEN[name]
    model = tiny_model(family)
    report = ap.apply(model, patch)
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = config["attnpatch"]["patches"][0]
    assert not FOUND & kept.keys()
    assert kept == report.record["patches"][0]
    for text in (str(report), str(report.plan), repr(report), str(report.record)):
        assert not re.search(rf"\b({'|'.join(FOUND)})['\"]?[=:]", text)
    ids = torch.arange(5, 45)[None]
    again = ap.load(tmp_path / "out")
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


OLDER = {
    "llama": (
        "self_extend",
        "found",
        {f"model.layers.{n}.self_attn": ["model.rotary_emb", "inv_freq", True, 4] for n in (0, 1)},
    ),
    "gpt_neox": ("segment_recurrence", "turning", {"gpt_neox.layers.0.attention": None}),
    "gpt_neo": ("rotary", "counted", False),
}


@pytest.mark.parametrize("family", OLDER)
def test_a_checkpoint_of_an_earlier_release_loads_and_what_it_says_of_rotation_is_not_believed(family, tmp_path):
    name, field, wrong = OLDER[family]
    model = tiny_model(family)
    ap.apply(model, MEMORY if name == "segment_recurrence" else CHOSEN[name][1])
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["attnpatch"]["patches"][0][field] = wrong
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    ids = torch.arange(5, 45)[None]
    with pytest.warns(UserWarning, match=rf"patches\[0\]\.{field} is ignored"):
        again = ap.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    if name == "rotary":
        with pytest.raises(ap.AttnPatchError, match="can only count the tokens"):
            again(ids, position_ids=3 * torch.arange(40)[None])
    again.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["attnpatch"]["patches"][0]
    assert field not in kept


@pytest.mark.parametrize(
    "family", ["llama", "cohere", "gpt_neox", "gemma3_text", "phi3", "mixtral", "stablelm", "qwen3"]
)
def test_without_weights_the_same_is_found(family):
    model = tiny_model(family)
    anatomy, before = describe(model), snapshot(model)
    paths = [site.path for site in anatomy.sites]
    wanted = survey(model, anatomy), ways(model, anatomy, paths)
    with weightless(model):
        assert all(p.is_meta for p in model.parameters())
        found = survey(model, anatomy), ways(model, anatomy, paths)
    assert found == wanted
    assert snapshot(model) == before
    with torch.device("meta"):
        empty = type(model)(model.config)
    with weightless(empty):
        assert (survey(empty, describe(empty)), ways(empty, describe(empty), paths)) == wanted
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "codegen", "bert"])
def test_whether_positions_reach_attention_is_found_again(family, tmp_path):
    """GPT-Neo hands them to its table only, so that others than those counted from 0 are refused."""
    model = tiny_model(family)
    ap.apply(model, ap.Rotary(theta=500.0))
    model.save_pretrained(tmp_path)
    hooks = [
        [type(h) for m in each.modules() for h in m._forward_pre_hooks.values()] for each in (model, ap.load(tmp_path))
    ]
    assert hooks[0] == hooks[1]
    assert (CountedOnly in hooks[0]) == (family == "gpt_neo")


def test_a_block_that_fails_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), weightless(model):
        raise ZeroDivisionError
    assert snapshot(model) == before
    with torch.no_grad():
        assert model(torch.arange(5, 9)[None]).logits.isfinite().all()


def test_no_memory_is_taken_for_weights():
    """A model of 10^12 parameters is looked at in a second."""
    with torch.device("meta"):
        model = tiny_model("llama", hidden_size=1 << 14, intermediate_size=1 << 22, num_attention_heads=128)
    assert sum(p.numel() for p in model.parameters()) > 10**11
    with weightless(model):
        found, _ = survey(model, describe(model))
    assert {way[:3] for way in found.values()} == {("model.rotary_emb", "inv_freq", False)}
