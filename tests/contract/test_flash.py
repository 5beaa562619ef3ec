"""The attention function that a report names is the one that runs."""

import collections

import pytest
import torch
from architectures import tiny_model
from matrix import applicable
from patches import build
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_attnpatch as ap
from hf_attnpatch.attention.registry import FUSED
from hf_attnpatch.edits import SetAttention
from hf_attnpatch.probe import default_inputs, trace


@pytest.fixture
def counted(monkeypatch):
    calls = collections.Counter()

    def count(name, function):
        def counting(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return counting

    def watch():  # again after a patch, which may register one
        for name, function in dict(AttentionInterface._global_mapping).items():
            if function.__name__ != "counting":
                monkeypatch.setitem(AttentionInterface._global_mapping, name, count(name, function))

    watch()
    calls.watch = watch
    return calls


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable("flash"))
def test_the_named_function_runs_once_for_each_site(model_type, encoder, case, counted):
    model = build(model_type, encoder, case)
    report = ap.apply(model, case.patch)
    counted.watch()
    name = model.config._attn_implementation
    if name == FUSED:  # no function of the registry: tests/test_deferred.py
        assert "sdpa on cpu" in str(report)
        return
    assert name in str(report)
    assert case.patch.backend in ("auto", name)
    sites = [site for site in ap.describe(model).sites if site.dispatches]
    ran = trace(model, default_inputs(model), tuple(site.path for site in sites)).calls
    counted.clear()
    trace(model, default_inputs(model))
    assert counted[name] >= max(1, sum(ran.values()))  # latent attention dispatches, too, and is no site
    assert set(counted) == {name}


def test_auto_never_picks_what_has_no_backward_when_training():
    model = tiny_model("gemma2", attn_implementation="eager")  # soft-capping: only flex_attention has it
    assert "flex_attention" in str(ap.plan(model, ap.Flash(training=False)))
    with pytest.raises(ap.UnsupportedArchitecture, match="flex_attention has no backward on CPU"):
        ap.plan(model, ap.Flash(training=True))
    with pytest.raises(ap.AttnPatchError, match="no backward on CPU"):
        ap.plan(model.train(), ap.Flash(backend="flex_attention"))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("flash_attention_2", "needs a CUDA device, the model is on cpu"),
        ("flash_attention_3", "needs a CUDA device, the model is on cpu"),
        ("flash_attention_4", "needs a CUDA device, the model is on cpu"),
        ("kernels-community/flash-attn2", r"hf_attnpatch\[kernels\]"),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error(backend, words):
    model = tiny_model("llama")
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.apply(model, ap.Flash(backend=backend))


@pytest.mark.parametrize("backend", ["fast", "flash", "", "a/b/c", None, 2])
def test_an_unknown_backend_lists_the_known(backend):
    with pytest.raises(ap.AttnPatchError, match="sdpa"):
        ap.Flash(backend=backend)


def test_a_kernel_that_disagrees_is_passed_over(monkeypatch):
    def wrong(module, query, key, value, mask, **kwargs):
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", wrong)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrong
    model = tiny_model("llama", attn_implementation="eager")
    assert "passed over sdpa: logits differ by" in " ".join(str(ap.apply(model, ap.Flash())).split())
    assert model.config._attn_implementation == "flex_attention"
    with pytest.raises(ap.AttnPatchError, match="sdpa: logits differ by"):
        ap.apply(tiny_model("llama", attn_implementation="eager"), ap.Flash(backend="sdpa"))


def test_a_family_that_chooses_when_built_gets_it_by_hooks():
    model = tiny_model("falcon", attn_implementation="eager")
    with pytest.raises(ap.AttnPatchError, match="when it is built"):
        SetAttention("", "sdpa").run(model)
    assert model.config._attn_implementation == "eager"
    assert ap.apply(model, ap.Flash(backend="sdpa")).changed
    assert model.config._attn_implementation == FUSED


@pytest.mark.full
@pytest.mark.compiled
def test_compiled_flex_attention_agrees():
    model = tiny_model("llama", attn_implementation="eager")
    wanted = trace(model, default_inputs(model)).logits
    with ap.patched(model, ap.Flash(backend="flex_attention")):
        found = trace(model, default_inputs(model)).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert not torch.equal(found, wanted)  # another kernel ran
