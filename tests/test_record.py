"""``config.attnpatch``: read by schema, versioned, and what the patches were."""

import json

import pytest
from architectures import tiny_model

import hf_attnpatch as ap
from hf_attnpatch import record
from hf_attnpatch.patch import REGISTRY

GOOD = {
    "version": 1,
    "patches": [{"patch": "grouped_query", "num_kv_heads": 2, "method": "mean", "stock": False}],
    "base_model": "gpt2",
    "base_model_type": "gpt2",
    "stock": False,
    "versions": {"hf_attnpatch": "0.1", "transformers": "5.0"},
}


def test_a_record_comes_back_as_it_was():
    assert record.parse(GOOD).to_dict() == GOOD
    assert record.parse(json.loads(json.dumps(GOOD))).to_dict() == GOOD


def test_structure_is_restored_for_what_the_config_does_not_say():
    stock = {"patch": "rope_scaling", "kind": "yarn", "factor": 2.0, "stock": True}
    found = record.parse({**GOOD, "patches": [stock, *GOOD["patches"]]})
    assert found.restore() == [ap.GroupedQuery(num_kv_heads=2, method="first")]  # the cheapest that has the shapes


@pytest.mark.parametrize("missing", [name for name in GOOD if name != "version"])
def test_a_missing_field_is_named(missing):
    with pytest.raises(ap.AttnPatchError, match=rf"config\.attnpatch: {missing} is missing; its fields are: version"):
        record.parse({key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("patches", {"a": 1}), ("patches", "grouped_query"), ("stock", 1), ("stock", "no"), ("versions", [1])],
        ("base_model", 3),
    ],
)
def test_a_field_of_another_type_is_named(field, value):
    wanted = rf"config\.attnpatch\.{field} is .*; wanted (a list|text|true|a mapping)"
    with pytest.raises(ap.AttnPatchError, match=wanted):
        record.parse({**GOOD, field: value})


@pytest.mark.parametrize("data", [None, [], "yes", 1])
def test_what_is_no_mapping_is_refused(data):
    with pytest.raises(ap.AttnPatchError, match="must be the mapping"):
        record.parse(data)


@pytest.mark.parametrize("version", [2, 99, 0, -1, None, "1", 1.5])
def test_another_version_says_to_upgrade(version):
    with pytest.raises(ap.AttnPatchError, match="upgrade hf_attnpatch"):
        record.parse({**GOOD, "version": version})


def test_a_patch_that_is_no_mapping_is_located():
    with pytest.raises(ap.AttnPatchError, match=r"patches\[1\] is flash; wanted a mapping"):
        record.parse({**GOOD, "patches": [GOOD["patches"][0], "flash"]})


def test_a_model_without_one_has_none():
    assert record.read(tiny_model("llama").config) is None


def test_the_record_names_everything():
    model = tiny_model("llama")
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="first"), ap.RopeScaling(kind="linear", factor=2.0))
    found = record.read(model.config)
    assert found.to_dict() == report.record == model.config.to_dict()["attnpatch"]
    assert [p["patch"] for p in found.patches] == ["grouped_query", "rope_scaling"]
    assert found.patches[0]["method"] == "first"
    assert found.base_model_type == "llama"
    assert found.stock
    assert found.versions["hf_attnpatch"] == ap.__version__
    assert json.loads(json.dumps(report.record)) == report.record


def test_a_second_call_adds_to_the_record_and_a_revert_takes_it_off():
    model = tiny_model("gpt_neox")
    ap.patch_rope_scaling(model, kind="linear", factor=2.0)
    first = record.read(model.config)
    report = ap.patch_grouped_query(model, num_kv_heads=2)
    both = record.read(model.config)
    assert both.patches[:1] == first.patches
    assert (first.stock, both.stock) == (True, False)
    assert both.base_model_type == "gpt_neox"
    report.revert()
    assert record.read(model.config) == first


def test_the_choice_of_a_kernel_is_not_recorded():
    model = tiny_model("llama", attn_implementation="eager")
    assert ap.patch_flash(model, backend="sdpa").record is None
    assert record.read(model.config) is None


PATCHES = [
    ap.GroupedQuery(num_kv_heads=2),
    ap.GroupedQuery(num_kv_heads=1, method="mean_rescaled"),
    ap.RopeScaling(kind="yarn", factor=4.0, beta_fast=16.0),
    ap.RopeScaling(kind="longrope", factor=4.0, long_factor=(1.0, 2.0), short_factor=(1.0, 1.0)),
    ap.RopeScaling(kind="linear", factor=2, layer_types=("full_attention",)),
    ap.Flash(backend="sdpa", training=False),
    ap.Alibi(distance_clip=64),
    ap.Rotary(theta=500.0, partial=0.5),
    ap.RelativeXl(size=32, init="zero"),
    ap.Sinusoidal(amplitude=0.5),
    ap.NoPosition(),
    ap.PositionTable(length=2048, method="tile"),
    ap.SelfExtend(window=128, group=4),
    ap.DualChunk(chunk=384),
    ap.ReRope(window=256, leak=0.1),
    ap.JetLong(window=64),
    ap.AttentionSinks(num_sinks=2, window=64),
    ap.ScoreTemperature(slope=0.1, step=64),
    ap.Windowed(window=64, layers=[0, 2]),
    ap.Latent(rank=20, rope_dim=16, method="principal"),
    ap.SegmentRecurrence(segment_length=8, memory_length=16, positions="running"),
]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_a_patch_survives_json(patch):
    again = ap.from_spec(json.loads(json.dumps(patch.to_record())))
    assert again == patch
    assert hash(again) == hash(patch)


def test_every_patch_is_tested_here():
    assert {patch.name for patch in PATCHES} == set(REGISTRY)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"patch": "gqa"}, "'gqa' does not exist; choose from: .*grouped_query"),
        ({}, "None does not exist"),
        ({"patch": ["flash"]}, "does not exist"),
        ({"patch": "grouped_query", "heads": 2}, "no field heads; its fields are: num_kv_heads, method,"),
        ({"patch": "grouped_query"}, "num_kv_heads.*its fields are"),
        ({"patch": "grouped_query", "num_kv_heads": "2"}, "must be a whole number"),
        ({"patch": "rope_scaling", "kind": "yarn", "factor": "four"}, "a finite number of at least 1"),
    ],
)
def test_a_spec_that_will_not_do(spec, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.from_spec(spec)
