"""What a model takes beside text is tried before and after a patch: what is accepted runs, what cannot is refused."""

import pytest
import torch
from architectures import tiny_model
from media_models import media_model
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.media import AXES, probes
from hf_attnpatch.probe import largest_difference

ALIBI = ap.Alibi(backend="sdpa")
SPANS = (ap.SelfExtend(window=6, group=3, trained=10), ap.AttentionSinks(num_sinks=2, window=6))


def test_a_model_of_text_is_asked_with_text_alone():
    found = probes(tiny_model("llama"))
    assert sorted(found.main) == ["attention_mask", "input_ids"]
    assert not found.more
    assert not found.missing


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("gemma3", {"tokens without a mask", "an image", "an image and types of tokens"}),
        ("paligemma", {"tokens without a mask", "an image", "an image and types of tokens"}),
        ("llava", {"tokens without a mask", "an image"}),
        ("idefics3", {"tokens without a mask", "an image"}),
        ("qwen2_vl", {"tokens without a mask", AXES, "an image"}),
    ],
)
def test_probes_carry_what_the_processor_makes(model_type, wanted):
    found = probes(media_model(model_type))
    assert set(found.more) == wanted
    assert not found.missing


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2", "pixtral", "clip", "hubert", "wav2vec2", "whisper"])
def test_the_main_probe_is_what_the_model_reads(model_type):
    model = media_model(model_type)
    assert model.main_input_name in probes(model).main


def test_an_image_of_no_known_form_is_said():
    model = media_model("llava")
    model.config.image_token_id = model.model.config.image_token_id = 10**6
    checks = ap.patch_grouped_query(model, num_kv_heads=2, method="mean").checks
    assert checks["with an image"].startswith("not tried, so that nothing is known of it")


def test_flash_keeps_the_image_prefix_of_paligemma_or_is_refused():
    model = media_model("paligemma")
    with pytest.raises(ap.AttnPatchError, match="logits differ"):
        ap.patch_flash(model, backend="sdpa")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl", "idefics3", "whisper", "t5"])
def test_flash_keeps_the_logits_with_everything(model_type):
    model = media_model(model_type)
    asked = probes(model)
    every = [asked.main, *asked.more.values()]
    with torch.no_grad():
        wanted = [model(**inputs).logits for inputs in every]
        assert ap.patch_flash(model, backend="sdpa").changed
        found = [model(**inputs).logits for inputs in every]
    seen = [asked.main.get("attention_mask"), *[None] * len(asked.more)]
    for mask, before, after in zip(seen, wanted, found, strict=True):
        rows = slice(None) if mask is None or mask.shape != before.shape[:2] else mask.bool()
        assert largest_difference(before[rows], after[rows]) < 1e-5


@pytest.mark.parametrize("patch", [ALIBI, *SPANS], ids=lambda p: p.name)
def test_what_cannot_see_image_blocks_is_refused_by_apply(patch):
    with pytest.raises(ap.AttnPatchError, match=r"an image and types of tokens .*image blocks"):
        ap.apply(media_model("gemma3"), patch)


@pytest.mark.parametrize("patch", [ALIBI, *SPANS], ids=lambda p: p.name)
def test_a_probe_of_text_alone_patches_for_text_alone(patch):
    model = media_model("gemma3")
    ids = torch.arange(5, 21).view(2, 8)
    assert ap.apply(model, patch, probe={"input_ids": ids}).changed


@pytest.mark.parametrize("patch", [ALIBI, *SPANS], ids=lambda p: p.name)
def test_the_prefix_that_is_seen_both_ways_is_refused(patch):
    with pytest.raises(ap.AttnPatchError, match="paligemma|PaliGemma"):
        ap.apply(media_model("paligemma"), patch)


@pytest.mark.parametrize(
    "patch",
    [
        ap.PositionTable(length=128),
        ap.Sinusoidal(),
        ap.SegmentRecurrence(segment_length=8, memory_length=8),
        *SPANS,
    ],
    ids=lambda p: p.name,
)
def test_positions_of_several_axes_are_refused_by_name(patch):
    with pytest.raises(ap.AttnPatchError, match=r"several (axes|dimensions)"):
        ap.apply(media_model("qwen2_vl"), patch)


@pytest.mark.parametrize("patch", [ALIBI, ap.Rotary(theta=500.0)], ids=lambda p: p.name)
def test_what_takes_several_axes_runs_with_an_image(patch):
    model = media_model("qwen2_vl")
    asked = probes(model)
    ap.apply(model, patch)
    with torch.no_grad():
        for inputs in asked.more.values():
            assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    "patch", [ap.Sinusoidal(), ap.PositionTable(length=64, init="sinusoidal")], ids=lambda p: p.name
)
def test_positions_are_added_inside_so_that_images_are_still_found(patch):
    model = media_model("llava")
    image = probes(model).more["an image"]
    ap.apply(model, patch)
    assert model(**image).logits.isfinite().all()


CELLS = [
    (model_type, patch)
    for model_type in ("vit", "deit", "dinov2", "pixtral", "clip", "hubert", "wav2vec2")
    for patch in (ap.Flash(), ALIBI, ap.GroupedQuery(num_kv_heads=2), ap.NoPosition(), ap.RelativeXl(backend="sdpa"))
]


@pytest.mark.parametrize(("model_type", "patch"), CELLS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_towers_alone_are_right_or_refused(model_type, patch):
    model = media_model(model_type)
    inputs = probes(model).main
    with torch.no_grad():
        wanted = model(**inputs)[0]
    before = snapshot(model)
    try:
        report = ap.apply(model, patch)
    except ap.AttnPatchError:
        assert patch.name != "flash"
        assert snapshot(model) == before
        return
    with torch.no_grad():
        found = model(**inputs)[0]
    assert report.changed
    assert found.isfinite().all()
    if patch.name == "flash":
        assert largest_difference(wanted, found) < 1e-5


def test_verify_refuses_what_reads_no_tokens():
    with pytest.raises(ap.UnsupportedArchitecture, match="reads pixel_values"):
        ap.verify(media_model("vit"))
