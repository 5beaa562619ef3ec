"""What ``apply`` must not let through: patches that break one promise each, and the model afterwards."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from transformers import LlamaConfig

import hf_attnpatch as ap
from hf_attnpatch import api
from hf_attnpatch.edits import AddHook, SetAttribute
from hf_attnpatch.patch import REGISTRY, Patch, Proposal

ATTENTION = "model.layers.0.self_attn"


def _hook(function, path="lm_head"):
    return AddHook(path, lambda module, args, kwargs, output: function(output), "a test's")


def _raising(error):
    def hook(output):
        raise error

    return hook


@pytest.fixture
def odd(monkeypatch):
    """A patch that proposes what it is given; forgotten after the test."""
    monkeypatch.setattr("hf_attnpatch.patch.REGISTRY", dict(REGISTRY))

    @dataclass(frozen=True, kw_only=True)
    class Odd(Patch):
        name: ClassVar[str] = "odd"
        recorded: ClassVar[bool] = False
        proposal: Any = None

        def propose(self, model, anatomy):
            return self.proposal

    return lambda *edits, **fields: Odd(proposal=Proposal(edits, **{"sites": (ATTENTION,), **fields}))


def _one_layer(**overrides):
    return tiny_model("llama", num_hidden_layers=1, **overrides)


def _never_run(model):
    model.model.layers[0].self_attn.spare = torch.nn.Linear(2, 2)


REFUSED = [
    (lambda out: out[..., :-1], {}, "logits are wrong on the probe: shape"),
    (lambda out: out * float("nan"), {}, "logits are wrong on the probe: not finite"),
    (lambda out: out * 1.001, {"preserves": True}, "must not change the logits, but logits differ by 0.001"),
    (_raising(TypeError("no such argument")), {}, "does not after it .TypeError: no such argument"),
    (lambda out: out, {"sites": ()}, "odd names no module whose calls could be counted"),
    (lambda out: out, {"sites": (f"{ATTENTION}.spare",)}, "no probe calls a module that was patched, and no logit"),
]


@pytest.mark.parametrize(("function", "fields", "words"), REFUSED, ids=[words[:24] for *_, words in REFUSED])
def test_what_breaks_a_promise_is_undone(function, fields, words, odd):
    model = _one_layer()
    _never_run(model)
    before = snapshot(model)
    with pytest.raises(ap.SelfCheckFailed, match=words):
        ap.apply(model, odd(_hook(function), **fields))
    assert snapshot(model) == before


def test_what_stays_within_its_promise_is_applied(odd):
    """The same patches, a little less wrong; and without the check, any of them."""
    model = _one_layer()
    report = ap.apply(model, odd(_hook(lambda out: out * (1 + 2e-6)), preserves=True))
    assert report.checks["sites called"].startswith("1 of 1")
    assert "e-06 of the largest logit" in report.checks["largest change of a logit"]
    report.revert()
    assert ap.apply(model, odd(_hook(lambda out: out * 1.5))).checks["largest change of a logit"].startswith("0.5 ")
    report = ap.apply(_one_layer(), odd(_hook(lambda out: out * float("nan"))), self_check=False)
    assert report.checks == {"self-check": "not run"}
    model = _one_layer()
    _never_run(model)
    report = ap.apply(model, odd(_hook(lambda out: out * 1.5), sites=(f"{ATTENTION}.spare",)))
    assert "nothing is known of them" in report.checks["sites not called"]


def test_an_architecture_that_only_a_forward_can_tell_is_refused_as_such(odd):
    model, error = _one_layer(), ap.UnsupportedArchitecture("lm_head: not for this.")
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match=r"lm_head: not for this\. The model is unchanged\.") as caught:
        ap.apply(model, odd(_hook(_raising(error))))
    assert not isinstance(caught.value, ap.SelfCheckFailed)
    assert snapshot(model) == before


def test_a_plan_without_edits_runs_and_records_nothing(odd, monkeypatch):
    monkeypatch.setattr(api, "trace", _raising(AssertionError("ran")))
    model = _one_layer()
    before = snapshot(model)
    report = ap.apply(model, odd())
    assert report.checks == {"edits": "none needed; the model is untouched"}
    assert snapshot(model) == before


def test_what_a_patch_prepares_sees_the_model_before_the_first_edit(odd):
    model, seen = _one_layer(), []
    prepare = lambda m: seen.append(m.config.rms_norm_eps) or {"found": 3}  # noqa: E731
    old = model.config.rms_norm_eps
    edit = SetAttribute(ATTENTION, "mark", 1)
    report = ap.apply(model, odd(edit, prepare=prepare))
    assert seen == [old]
    assert report.findings == {"odd": {"found": 3}}
    assert model.model.layers[0].self_attn.mark == 1


def test_what_was_made_for_the_edits_is_let_go(odd):
    let_go = []
    ap.apply(_one_layer(), odd(SetAttribute(ATTENTION, "mark", 1), release=lambda: let_go.append(1)))
    assert let_go == [1]


@pytest.mark.parametrize("preserves", [True, False])
def test_logits_that_were_not_finite_before_are_said_to_be_the_model_s(preserves, odd):
    model = _one_layer()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match="not finite before anything is patched") as caught:
        ap.apply(model, odd(EDIT, preserves=preserves))
    assert not isinstance(caught.value, ap.SelfCheckFailed)
    assert snapshot(model) == before


def test_how_much_of_the_model_was_compared_is_said(odd):
    model = tiny_model("llama")
    said = ap.apply(model, odd(_hook(lambda out: out * 1.5))).checks["largest change of a logit"]
    assert said == "0.5 of the largest logit, in the first 1 of its layers"


# -- what the config remembers -----------------------------------------------------------------------------------------


def test_a_record_goes_on_from_the_one_before():
    """Of two patches one of which stock transformers cannot read, neither call loses what the other wrote."""
    for first, second in (
        (ap.NoPosition(home=None), ap.GroupedQuery(num_kv_heads=2, method="first")),
        (ap.GroupedQuery(num_kv_heads=2, method="first"), ap.NoPosition(home=None)),
    ):
        each, once = _one_layer(), _one_layer()
        ap.apply(each, first)
        assert each.config.attnpatch["stock"] is (first.name == "grouped_query")
        assert (type(each.config) is LlamaConfig) is each.config.attnpatch["stock"]
        ap.apply(each, second)
        ap.apply(once, first, second)
        for model in (each, once):
            kept = model.config.attnpatch
            assert {one["patch"]: one["stock"] for one in kept["patches"]} == {
                "no_position": False,
                "grouped_query": True,
            }
            assert len(kept["patches"]) == 2
            assert kept["base_model_type"] == "llama"
            assert kept["stock"] is False
            assert type(model.config) is not LlamaConfig


def test_contexts_are_those_that_a_tokenizer_may_have_been_made_for():
    assert api._contexts((), None) == ()
    assert api._contexts((8, 16), None) == (8, 16)
    assert api._contexts((), (8, 16)) == (8, 16)
    assert api._contexts((8, 16), (16, 32)) == (8, 16, 32)
    assert api._contexts((8, 16), (24, 32)) == (8, 16, 24, 32)  # raised by other hands


# -- cached decoding: whose fault it is --------------------------------------------------------------------------------


def _said(monkeypatch, told):
    """Decoding finds what ``told`` says of (patched, single steps alone)."""
    asked = []

    def decoding(model, inputs, sites, promises=(), steps=None):
        key = hasattr(model.model.layers[0].self_attn, "mark"), steps == (1, 1)
        asked.append(key)
        return told[key], "" if told[key] else "equal"

    monkeypatch.setattr(api, "decoding", decoding)
    return asked


PATCHED, BEFORE, PATCHED_SINGLE, BEFORE_SINGLE = (True, False), (False, False), (True, True), (False, True)
EDIT = SetAttribute(ATTENTION, "mark", 1)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {PATCHED: "far off", BEFORE: None},
            "does not decode what it computes at once: far off. Before the patch it did",
        ),
        (
            {PATCHED: "far off", BEFORE: "off", BEFORE_SINGLE: None, PATCHED_SINGLE: "wrong"},
            "does not decode token by token: wrong",
        ),
    ],
)
def test_decoding_that_the_patch_broke_is_refused(told, words, odd, monkeypatch):
    model, asked = _one_layer(), _said(monkeypatch, {BEFORE_SINGLE: None, **told})
    before = snapshot(model)
    with pytest.raises(ap.SelfCheckFailed, match=words):
        ap.apply(model, odd(EDIT))
    assert set(told) <= set(asked)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({PATCHED: None}, "equal"),
        (
            {PATCHED: "far off", BEFORE: "off", BEFORE_SINGLE: None, PATCHED_SINGLE: None},
            "equal; two tokens at once fail as before the patch: off",
        ),
        ({PATCHED: "far off", BEFORE: "off", BEFORE_SINGLE: "too"}, "differs from the full forward, as before.*: off"),
    ],
)
def test_decoding_that_was_wrong_before_is_said_and_the_patch_stands(told, words, odd, monkeypatch):
    model, asked = _one_layer(), _said(monkeypatch, told)
    report = ap.apply(model, odd(EDIT))
    assert set(asked) == set(told)
    assert model.model.layers[0].self_attn.mark == 1
    assert re.fullmatch(words, report.checks["cached decoding"])
    report.revert()
    assert not hasattr(model.model.layers[0].self_attn, "mark")
