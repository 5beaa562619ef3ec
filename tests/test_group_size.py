"""`num_kv_heads="auto"`: the number that fits a cache, and why."""

import pytest
import torch
from architectures import tiny_model
from gauges import replicate, transform
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.evaluation import cache_bytes_per_token


def auto(target, **more):
    return ap.GroupedQuery(num_kv_heads="auto", cache_target=target, **more)


def tokens():
    return torch.randint(5, 99, (6, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("share", "wanted"), [(0.25, 1), (0.3, 1), (0.5, 2), (0.9, 2)])
def test_the_most_that_fits_a_share(model_type, share, wanted):
    """Random heads have nothing in common, so every one that fits is worth its bytes."""
    model = tiny_model(model_type)
    before = cache_bytes_per_token(model)
    report = ap.apply(model, auto(share))
    assert {s.num_kv_heads for s in ap.describe(model).sites} == {wanted}
    assert cache_bytes_per_token(model) == before * wanted / 4 <= before * share
    assert report.record["patches"][0]["num_kv_heads"] == wanted
    assert "cache_target" not in report.record["patches"][0]
    assert f"num_kv_heads=auto took {wanted}, the most that fit" in str(report).replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_token_are_those_of_the_cache(dtype):
    model = tiny_model("llama", dtype=dtype)
    whole = int(cache_bytes_per_token(model))
    for bytes_, wanted in ((whole // 2, 2), (whole // 2 - 1, 1), (whole // 4, 1)):
        with ap.patched(model, auto(bytes_)):
            assert ap.describe(model).sites[0].num_kv_heads == wanted
    with pytest.raises(ap.AttnPatchError, match=f"is {whole // 4 - 1} bytes per token; one .* takes {whole // 4}"):
        ap.plan(model, auto(whole // 4 - 1))


@pytest.mark.parametrize("text", [None, "tokens"])
def test_heads_that_agree_need_fewer(text):
    """Four heads that are two: two lose nothing, so four of four are a waste; one does lose."""
    model = tiny_model("llama")
    replicate(model, 2)
    transform(model)
    more = {"calibration": tokens(), "method": "calibrated"} if text else {}
    report = ap.apply(model, auto(1.0, **more))
    assert ap.describe(model).sites[0].num_kv_heads == 2
    assert "hardly more than 4" in " ".join(str(report).split())


def test_all_that_are_there_may_fit():
    model = tiny_model("llama")
    before = snapshot(model)
    report = ap.apply(model, auto(1.0))
    assert not report.changed
    assert "auto took 4" in " ".join(str(report).split())
    assert snapshot(model) == before


def test_a_plan_decides_and_leaves_no_trace():
    model = tiny_model("llama").train()
    before, state = snapshot(model), torch.get_rng_state()
    plan = ap.plan(model, auto(0.5, calibration=tokens()))
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    text = " ".join(str(plan).split())
    assert "num_kv_heads=auto took 2" in text
    assert "bytes per token (energy lost at 1:" in text


def test_text_that_comes_once_is_enough():
    """An iterable of inputs is read for the choice and for the conversion."""
    text = ({"input_ids": row[None]} for row in tokens())
    report = ap.apply(tiny_model("llama"), auto(0.5, calibration=text, method="calibrated"))
    assert report.damage.method == "calibrated"


def test_too_little_text_is_too_little_for_the_choice_as_well():
    with pytest.raises(ap.CalibrationError, match="calibration has 20 tokens"):
        ap.apply(tiny_model("llama"), auto(0.5, calibration=tokens()[:1, :20]))


@pytest.mark.parametrize("target", [0, -1, 0.0, -0.5, True, "half", float("nan"), [0.5]])
def test_targets_that_are_none(target):
    with pytest.raises(ap.AttnPatchError, match="cache_target is .*; wanted a share"):
        ap.plan(tiny_model("llama"), auto(target))


@pytest.mark.parametrize("target", [0.1, 1])
def test_targets_that_nothing_fits(target):
    with pytest.raises(
        ap.AttnPatchError, match="one key-value head takes 256, the model has 1024 now; raise the target"
    ):
        ap.plan(tiny_model("llama"), auto(target))


def test_the_two_settings_belong_together():
    with pytest.raises(ap.AttnPatchError, match="belong together"):
        ap.GroupedQuery(num_kv_heads="auto")
    with pytest.raises(ap.AttnPatchError, match="belong together"):
        ap.GroupedQuery(num_kv_heads=2, cache_target=0.5)
