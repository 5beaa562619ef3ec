"""A plan is a dry run: it prints, it refuses conflicts, it touches nothing. A report says what happened."""

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from torch import nn

import hf_attnpatch as ap
from hf_attnpatch.patch import Proposal
from hf_attnpatch.probe import default_inputs, trace


def _text(printable):
    return " ".join(str(printable).split())


@pytest.mark.parametrize(
    ("model_type", "patch", "words"),
    [
        ("llama", ap.GroupedQuery(num_kv_heads=2), ["config.num_key_value_heads", "k_proj", "x2", "checkpoint: yes"]),
        (
            "gpt2",
            ap.GroupedQuery(num_kv_heads=2),
            ["GroupedProjection(2 shared heads)", "1 of 2", "needs hf_attnpatch"],
        ),
        ("llama", ap.RopeScaling(kind="yarn", factor=4), ["config.rope_parameters", "rope: yarn", "512"]),
        ("gemma3_text", ap.RopeScaling(kind="llama3", factor=4), ["scales full_attention; sliding_attention left"]),
        ("gemma2", ap.Flash(), ["eager", "flex_attention", "passed over sdpa"]),
        ("llama", ap.Flash(), ["already in use: sdpa on cpu in float32"]),
    ],
)
def test_a_plan_says_what_would_happen_and_does_nothing(model_type, patch, words):
    model = tiny_model(model_type)
    before = snapshot(model)
    text = _text(ap.plan(model, patch))
    assert snapshot(model) == before
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("model_type", "patches", "claim"),
    [
        ("llama", [ap.GroupedQuery(num_kv_heads=2), ap.GroupedQuery(num_kv_heads=1)], "config.num_key_value_heads"),
        ("gpt2", [ap.GroupedQuery(num_kv_heads=2), ap.GroupedQuery(num_kv_heads=1)], "transformer.h.0.attn.c_attn"),
        (
            "llama",
            [ap.RopeScaling(kind="yarn", factor=2), ap.RopeScaling(kind="linear", factor=2)],
            "config.rope_parameters",
        ),
    ],
)
def test_two_patches_that_write_one_place_are_a_conflict(model_type, patches, claim):
    model = tiny_model(model_type)
    before = snapshot(model)
    for verb in (ap.plan, ap.apply):
        with pytest.raises(ap.PatchConflict, match=rf"{claim}: both {patches[0].name} and .*keep one"):
            verb(model, *patches)
    assert snapshot(model) == before


ROPE, LINEAR, SPANS = (
    ap.RopeScaling(kind="yarn", factor=2),
    ap.RopeScaling(kind="linear", factor=2),
    ap.SelfExtend(window=6, group=3, trained=10),
)


@pytest.mark.parametrize(
    ("model_type", "first", "second", "works"),
    [
        ("llama", ROPE, LINEAR, True),
        ("llama", ROPE, ap.Alibi(), True),
        ("llama", ap.Alibi(), ROPE, False),
        ("llama", ap.GroupedQuery(num_kv_heads=2), ap.GroupedQuery(num_kv_heads=1), True),
        ("gpt2", ap.GroupedQuery(num_kv_heads=2), ap.GroupedQuery(num_kv_heads=1), False),
        ("gpt2", ap.Rotary(), ap.Sinusoidal(), True),
    ],
)
def test_two_calls_are_advised_where_they_work(model_type, first, second, works):
    model = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(ap.PatchConflict) as refused:
        ap.plan(model, first, second)
    assert ("in two calls" in str(refused.value)) == works
    assert snapshot(model) == before
    ap.apply(model, first)
    if works:
        ap.apply(model, second)
    else:
        with pytest.raises(ap.AttnPatchError):
            ap.apply(model, second)


@pytest.mark.parametrize(
    "patches",
    [
        (ROPE, SPANS),
        (SPANS, ROPE),
        (ap.SegmentRecurrence(segment_length=8, memory_length=6), ROPE),
        (ap.SegmentRecurrence(segment_length=8, memory_length=6), ap.GroupedQuery(num_kv_heads=2, method="mean"), ROPE),
    ],
)
def test_one_call_does_what_the_calls_one_by_one_do(patches):
    """Where one stands on the other, whatever the order in which they are given."""
    once, each = tiny_model("llama"), tiny_model("llama")
    planned = ap.plan(once, *patches)
    report = ap.apply(once, *patches)
    for patch in patches:
        ap.apply(each, patch)
    inputs = default_inputs(once)
    assert torch.equal(trace(once, inputs).logits, trace(each, inputs).logits)
    assert [step.patch.name for step in planned.steps] == [step.patch.name for step in report.plan.steps]
    assert sorted(map(str, once.config.attnpatch["patches"])) == sorted(map(str, each.config.attnpatch["patches"]))


def test_one_call_that_cannot_be_is_refused_for_the_reason_of_two():
    model = tiny_model("llama")
    with pytest.raises(ap.UnsupportedArchitecture, match="rotary states further"):
        ap.plan(model, ap.NoPosition(), SPANS)


def test_two_kernels_are_a_conflict():
    model = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(ap.PatchConflict, match="_attn_implementation"):
        ap.plan(model, ap.Flash(backend="sdpa"), ap.Flash(backend="flex_attention"))


def test_patches_that_do_not_meet_go_together():
    model = tiny_model("llama", attn_implementation="eager")
    before = snapshot(model)
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2), ap.RopeScaling(kind="yarn", factor=2), ap.Flash())
    text = _text(report)
    for word in ("grouped_query(num_kv_heads=2", "rope_scaling(kind=yarn", "flash(", "self-check"):
        assert word in text
    report.revert()
    assert snapshot(model) == before


def test_no_patch_is_an_error():
    with pytest.raises(ap.AttnPatchError, match="no patch given"):
        ap.plan(tiny_model("llama"))


@pytest.mark.parametrize("wrong", [ap.GroupedQuery, "grouped_query", {"patch": "flash"}, None])
def test_what_is_no_patch_is_an_error(wrong):
    with pytest.raises(ap.AttnPatchError, match="pass patches"):
        ap.plan(tiny_model("llama"), wrong)


class _Module(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.module = inside


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (_Module, "patch model.module before wrapping"),
        (torch.compile, "patch before torch.compile"),
        (lambda model: model.state_dict(), "pass a transformers PreTrainedModel"),
    ],
)
def test_wrapped_models_are_refused_with_the_remedy(wrap, words):
    with pytest.raises(ap.UnsupportedArchitecture, match=words):
        ap.plan(wrap(tiny_model("llama")), ap.GroupedQuery(num_kv_heads=2))


def test_quantized_models_are_refused():
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(ap.UnsupportedArchitecture, match="patch the full-precision model first"):
        ap.plan(model, ap.GroupedQuery(num_kv_heads=2))


def test_integer_weights_are_refused():
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ap.UnsupportedArchitecture, match="model.layers.0.mlp.up_proj.weight is stored as torch.int8"):
        ap.plan(model, ap.GroupedQuery(num_kv_heads=2))


def test_a_sharded_model_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = fully_shard(tiny_model("llama"), mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ap.UnsupportedArchitecture, match="sharded over devices; patch before fully_shard"):
            ap.plan(model, ap.GroupedQuery(num_kv_heads=2))
    finally:
        dist.destroy_process_group()


def test_a_model_without_weights_is_refused():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(ap.AttnPatchError, match="meta"):
        ap.apply(model, ap.GroupedQuery(num_kv_heads=2))


def test_a_report_is_data_too():
    model = tiny_model("llama")
    report = ap.patch_grouped_query(model, num_kv_heads=2, method="first")
    assert report.changed
    assert report.stock
    assert report.checks["sites called"] == "2 of 2, as often as before"
    assert report.plan.steps[0].patch == ap.GroupedQuery(num_kv_heads=2, method="first", grouping="adjacent")
    assert [edit.rung for edit in report.plan.edits].count("module") == 4
    assert "(64, 64)" not in str(report)
    assert "out_features=32" in _text(report)


def test_the_self_check_can_be_left_out_or_fed():
    model = tiny_model("llama")
    ids = torch.arange(5, 13).view(1, 8)
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2), probe={"input_ids": ids})
    assert report.checks["logits"] == "finite, (1, 8, 128)"
    report.revert()
    assert ap.apply(model, ap.GroupedQuery(num_kv_heads=2), self_check=False).checks == {"self-check": "not run"}


def test_a_probe_that_the_model_does_not_take_is_an_error():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=r"does not run on the probe \(pixel_values\)"):
        ap.apply(model, ap.GroupedQuery(num_kv_heads=2), probe={"pixel_values": torch.zeros(1)})
    assert snapshot(model) == before


def test_an_anatomy_prints_every_place():
    text = _text(ap.describe(tiny_model("gemma3_text")))
    for word in ("Gemma3ForCausalLM", "positions rotary", "q/k/v", "full_attention", "context 128"):
        assert word in text, text


def test_a_plan_is_data_and_a_line():
    model = tiny_model("llama")
    plan = ap.plan(model, ap.NoPosition(home=None), ap.GroupedQuery(num_kv_heads=2, method="first"))
    found = plan.to_dict()
    assert {name: found[name] for name in ("model", "stock", "context")} == {
        "model": "LlamaForCausalLM",
        "stock": False,
        "context": None,
    }
    none, shared = sorted(found["patches"], key=lambda one: one["patch"], reverse=True)
    assert (none["patch"], none["stock"], shared["patch"], shared["stock"]) == (
        *("no_position", False),
        *("grouped_query", True),
    )
    assert shared["num_kv_heads"] == 2
    assert {"where": "config.num_key_value_heads", "rung": "config", "before": "4", "after": "2"} in shared["edits"]
    assert len(none["edits"]) + len(shared["edits"]) == len(plan.edits)
    longer = ap.plan(model, ap.RopeScaling(kind="yarn", factor=4))
    assert longer.to_dict()["context"] == [128, 512]
    assert longer.to_dict()["stock"] is True
    assert repr(longer) == (
        f"<Plan: LlamaForCausalLM, {len(longer.edits)} edits, checkpoint for stock: rope_scaling(kind=yarn, factor=4)>"
    )


def test_proposals_are_frozen():
    with pytest.raises(AttributeError):
        Proposal(()).stock = False
