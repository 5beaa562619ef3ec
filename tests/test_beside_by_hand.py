"""What ``apply`` says of inputs beside text, for every way in which they may go wrong; no model runs."""

import pytest
import torch
from torch import nn

from hf_attnpatch import beside
from hf_attnpatch.beside import Before, beside_text, remember
from hf_attnpatch.errors import AttnPatchError, SelfCheckFailed, UnsupportedArchitecture
from hf_attnpatch.media import AXES, Probes
from hf_attnpatch.probe import Trace

LOGITS = torch.tensor([[[1.0, -4.0]]])
MODEL = nn.Linear(1, 1)


@pytest.fixture
def runs(monkeypatch):
    """Let every forward give this, and decoding find that."""

    def run(found, decodes=None):
        def trace(model, inputs, sites):
            if isinstance(found, Exception):
                raise found
            return found if isinstance(found, Trace) else found[inputs["what"]]

        monkeypatch.setattr(beside, "trace", trace)
        monkeypatch.setattr(beside, "decoded_with", lambda model, inputs: decodes)

    return run


def before(what="an image", calls=None, decoding=None, **more):
    return Before({what: {}}, {what: Trace(LOGITS, calls or {"a": 2, "b": 0})}, {what: decoding}, **more)


@pytest.mark.parametrize(
    ("logits", "calls", "preserves", "words"),
    [
        (LOGITS * 1.5, {"a": 2}, False, None),
        (LOGITS * 1.5, {"a": 2}, True, "Linear, with an image: logits differ by 0.5"),
        (LOGITS, {"a": 2}, True, None),
        (LOGITS * float("nan"), {"a": 2}, False, "with an image: not finite"),
        (LOGITS[..., :1], {"a": 2}, False, r"with an image: shape \(1, 1, 1\) instead of \(1, 1, 2\)"),
        (LOGITS, {"a": 1}, False, "with an image: the patch has no effect"),
        (LOGITS, {}, False, "with an image: the patch has no effect"),
        (LOGITS, {"a": 2, "b": 1}, False, "with an image: the patch has no effect"),
        (LOGITS, {"a": 2, "c": 1}, False, None),  # of a module that was not there before
    ],
)
def test_a_promise_that_is_broken_with_an_image_alone(logits, calls, preserves, words, runs):
    runs(Trace(logits, calls))
    if words is not None:
        with pytest.raises(SelfCheckFailed, match=words):
            beside_text(MODEL, before(), preserves)
        return
    moved = 0.5 if logits[0, 0, 0] == 1.5 else 0
    wanted = {"with an image": f"finite, (1, 1, 2), moved by {moved} of the largest"}
    assert beside_text(MODEL, before(), preserves) == wanted


@pytest.mark.parametrize(
    ("was", "now", "end"),
    [
        (None, None, "of the largest"),
        (None, "far off", None),
        ("off", "far off", "of the largest; cached decoding differs from the full forward, as before the patch"),
        ("off", None, "of the largest"),
    ],
)
def test_decoding_that_the_patch_broke_with_an_image_alone(was, now, end, runs):
    runs(Trace(LOGITS, {"a": 2}), now)
    if end is None:
        with pytest.raises(SelfCheckFailed, match="with an image, does not decode what it computes at once: far off"):
            beside_text(MODEL, before(decoding=was), False)
        return
    assert beside_text(MODEL, before(decoding=was), False)["with an image"].endswith(end)


@pytest.mark.parametrize("what", ["an image", AXES])
@pytest.mark.parametrize(
    ("cause", "kind"), [(AttnPatchError("no such mask"), UnsupportedArchitecture), (TypeError("what"), SelfCheckFailed)]
)
def test_what_no_longer_runs_is_refused_where_there_is_a_reason_and_else_a_fault(what, cause, kind, runs):
    error = AttnPatchError("does not run")
    error.__cause__ = cause
    runs(error)
    with pytest.raises(kind) as caught:
        beside_text(MODEL, before(what), False)
    assert type(caught.value) is kind
    named = "several axes of positions (images)" if what == AXES else "an image"
    assert str(caught.value).startswith(f"Linear runs with {named} before the patch, and does not after it")
    assert str(cause) in str(caught.value)


def test_what_was_not_reached_and_not_tried_is_said(runs):
    runs(Trace(LOGITS, {}))
    found = beside_text(MODEL, Before(silent=("x", "y"), missing={"a film": "no processor"}), False)
    assert found == {
        "sites not called": "2 (x ...): nothing is known of them",
        "with a film": "not tried, so that nothing is known of it: no processor",
    }
    assert beside_text(MODEL, Before(), False) == {}


def test_everything_there_is_is_run_before(runs):
    traces = {"one": Trace(LOGITS, {"a": 1}), "two": Trace(LOGITS, {"b": 3})}
    runs(traces, "off")
    more = {name: {"what": name} for name in traces}
    asked = Probes({}, more, {"a film": "why"})
    found = remember(MODEL, asked, Trace(LOGITS, {"c": 1}), ("a", "b", "c", "d"))
    assert found == Before(more, traces, {"one": "off", "two": "off"}, {"a film": "why"}, ("d",))
