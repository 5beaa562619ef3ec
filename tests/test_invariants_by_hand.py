"""What ``verify`` and its invariants are made of, on models and numbers whose answer can be written down."""

import contextlib
import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from torch import nn
from transformers.utils import logging

import hf_attnpatch as ap
from hf_attnpatch.attention.registry import FUSED
from hf_attnpatch.invariants import Measured, Subject, copies, decoding, forward, kernels, training
from hf_attnpatch.invariants.noise import rounding
from hf_attnpatch.invariants.subject import compare, cut, pad, unpadded
from hf_attnpatch.stepwise import NoCache
from hf_attnpatch.upstream import words
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE, PASS, Finding, Verification, _default_inputs, find, untouched

VERIFY = importlib.import_module("hf_attnpatch.verify")  # by its name in the package it is the function
IDS = torch.tensor([[7, 8, 9], [20, 21, 22]])


def _subject(model_type, **kind):
    model = tiny_model(model_type, **kind)
    return Subject(model, ap.describe(model), {"input_ids": IDS})


# -- asking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "outcome"), [(0.0, PASS), (0.5, PASS), (0.5000001, FAIL), (float("inf"), FAIL), (float("nan"), FAIL)]
)
def test_a_figure_may_be_as_large_as_its_tolerance(figure, outcome):
    finding = find("a", lambda subject: Measured(figure, 0.5, "apart"), SimpleNamespace(model=nn.Linear(2, 2)))
    assert (finding.invariant, finding.outcome, finding.tolerance, finding.note) == ("a", outcome, 0.5, "apart")
    assert Verification("A", (finding,)).passed == (outcome == PASS)


def test_an_answer_in_words_is_no_pass_and_no_failure():
    finding = find("a", lambda subject: "no cache", SimpleNamespace(model=nn.Linear(2, 2)))
    assert finding == Finding("a", NOT_APPLICABLE, None, None, "no cache")


ERRORS = [
    *(ZeroDivisionError, AssertionError, AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError),
    *(ValueError, ap.AttnPatchError),
]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_a_failure_that_says_which(kind):
    def ask(subject):
        raise kind("first\nsecond " + "x" * 300)

    finding = find("a", ask, SimpleNamespace(model=nn.Linear(2, 2)))
    assert (finding.outcome, finding.measured) == (FAIL, None)
    assert finding.note.startswith(f"{kind.__name__}: ")
    assert len(finding.note) == 200
    assert "\n" not in finding.note


def test_a_question_is_asked_in_eval_mode_without_gradients_and_leaves_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.train()
    model[0].eval()
    model[0].weight.grad = grad = torch.ones(2, 2)
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()

    def ask(subject):
        assert not model.training
        assert not model[1].training
        assert not torch.is_grad_enabled()
        model[1].running_mean += torch.rand(2)
        model[0].weight.grad = None
        model[0].bias.grad = torch.ones(2)
        model.extra = 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find("a", ask, SimpleNamespace(model=model))
    assert [m.training for m in model.modules()] == [True, False, True]
    assert model[0].weight.grad is grad
    assert model[0].bias.grad is None
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model, "extra")
    assert torch.is_grad_enabled()
    with untouched(model):
        pass
    assert model[0].weight.grad is grad


@pytest.mark.parametrize("model_type", ["llama", "bart"])
def test_two_rows_of_ordinary_tokens(model_type):
    model = tiny_model(model_type, encoder=model_type == "bart")
    model.config.pad_token_id, model.config.eos_token_id = 10, [17, 24]
    inputs = _default_inputs(model)
    ids = inputs["input_ids"]
    assert set(inputs) == {"input_ids", *(["decoder_input_ids"] if model_type == "bart" else [])}
    assert ids.shape == (2, 24)
    assert not torch.equal(ids[0], ids[1])
    assert len(ids.unique()) > 24
    assert not {10, 17, 24} & set(ids.flatten().tolist())
    assert 0 <= int(ids.min())
    assert int(ids.max()) < model.config.vocab_size
    if "decoder_input_ids" in inputs:
        assert torch.equal(inputs["decoder_input_ids"], ids.flip(0))


def test_two_rows_of_eight_tokens_are_enough_and_a_mask_of_ones_hides_nothing(monkeypatch):
    asked = {"names": lambda subject: ",".join(subject.inputs)}
    monkeypatch.setattr(VERIFY, "INVARIANTS", asked)
    model, ids = tiny_model("llama", num_hidden_layers=1), torch.arange(5, 21).view(2, 8)
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        assert ap.verify(model, inputs=inputs)["names"].note == "input_ids"
    assert ap.verify(model)["names"].note == "input_ids"
    for few in (ids[:, :7], ids[:1]):
        with pytest.raises(ap.AttnPatchError, match="at least 2 rows of 8"):
            ap.verify(model, inputs={"input_ids": few})


def test_every_codebook_has_a_row_of_its_own(monkeypatch):
    monkeypatch.setattr(VERIFY, "codebooks", lambda model: 3)
    ids = _default_inputs(tiny_model("llama", num_hidden_layers=1))["input_ids"]
    assert ids.shape == (6, 24)
    assert [int(row) for row in (ids == ids[0]).all(1)] == [1, 1, 1, 0, 0, 0]


def test_a_verification_prints_a_row_for_each_finding():
    found = Verification(
        "Model",
        (Finding("first", PASS, 0.0123456, 0.5, "apart"), Finding("second", NOT_APPLICABLE, None, None, "no cache"))
        + (Finding("third", FAIL, 2.0, 1e-5, "far"), Finding("fourth", FAIL, None, None, "KeyError")),
    )
    head, names, *rows = [line for line in str(found).splitlines() if any(c.isalpha() for c in line)]
    assert head == "Model: 2 failed: third; fourth"
    assert re.findall(r"\w+", names) == ["invariant", "outcome", "measured", "allowed", "note"]
    assert [re.findall(r"[\w.-]+", row) for row in rows] == [
        ["first", "pass", "0.0123", "0.5", "apart"],
        ["second", "not", "applicable", "-", "-", "no", "cache"],
        ["third", "fail", "2", "1e-05", "far"],
        ["fourth", "fail", "-", "-", "KeyError"],
    ]
    assert found["third"].note == "far"
    assert str(Verification("Model", found.findings[:2])).splitlines()[0].strip() == "Model: nothing failed"


# -- padding -----------------------------------------------------------------------------------------------------------


def test_a_decoder_is_padded_on_the_left_and_told_its_positions():
    found = pad(_subject("llama"), {"input_ids": IDS}, 2)
    assert found["input_ids"].tolist() == [[7, 7, 7, 8, 9], [20, 20, 20, 21, 22]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1, 1]] * 2
    assert found["position_ids"].tolist() == [[0, 0, 0, 1, 2]] * 2


def test_a_decoder_that_takes_no_positions_is_told_none():
    subject = _subject("bloom")
    assert not subject.takes(words.POSITIONS)
    assert set(pad(subject, {"input_ids": IDS}, 2)) == {"input_ids", "attention_mask"}
    assert subject.run().get(CACHE) is None  # a cache is not asked for
    assert torch.equal(unpadded(subject, subject.inputs), subject.model(input_ids=IDS).logits)


def test_an_encoder_is_padded_on_the_right():
    subject = _subject("bert", encoder=True)
    found = pad(subject, {"input_ids": IDS}, 2)
    assert set(found) == {"input_ids", "attention_mask"}
    assert found["input_ids"].tolist() == [[7, 8, 9, 7, 7], [20, 21, 22, 20, 20]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert cut(subject, torch.arange(10).view(2, 5), 2).tolist() == [[0, 1, 2], [5, 6, 7]]


def test_what_is_cut_off_is_the_padding():
    subject = _subject("llama")
    assert cut(subject, torch.arange(10).view(2, 5), 2).tolist() == [[2, 3, 4], [7, 8, 9]]
    assert cut(subject, torch.arange(10).view(2, 5), 0).shape == (2, 5)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}
    twice = Subject(tiny_model("bart", encoder=True), subject.anatomy, inputs)
    assert twice.stream == "decoder_input_ids"
    assert cut(twice, torch.arange(4).view(2, 2), 2).shape == (2, 2)  # what grows was not padded
    assert set(pad(twice, twice.inputs, 1)) == {"input_ids", "decoder_input_ids", "attention_mask"}


@pytest.mark.parametrize(("rows", "widths"), [(7, None), (8, [4]), (100, [9]), (13, [9]), (12, [8]), (None, [9])])
def test_a_longer_request_is_as_long_as_the_table_has_room_for(rows, widths):
    """Three times as long, but for four rows that some families keep before the first position."""
    seen = []

    def logits(inputs=None):
        seen.append(None if inputs is None else inputs["input_ids"].shape[1])
        return torch.ones(1)

    subject = SimpleNamespace(
        model=nn.Linear(1, 1), tokens=IDS, inputs={"input_ids": IDS}, logits=logits,
        anatomy=SimpleNamespace(tables={} if rows is None else {"wpe": rows, "other": 200}),
    )  # fmt: skip
    found = forward.after_a_longer_request(subject)
    if widths is None:
        assert "no longer request fits into the position table of 7 rows" in found
    else:
        assert seen == [None, *widths, None]
        assert found == Measured(0.0, 0.0)


@pytest.mark.parametrize("ask", [forward.padded, forward.alone_or_in_a_batch])
def test_a_forward_without_a_mask_cannot_be_padded(ask):
    assert ask(SimpleNamespace(takes=lambda role: False)) == "its forward takes no attention mask"


# -- how much rounding explains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("apart", "allowed"), [(0.0, 1e-5), (9e-6, 1e-5), (3e-5, 3e-5), (9e-5, 9e-5), (5e-4, 1e-4), (float("nan"), 1e-5)]
)
def test_rounding_is_allowed_ten_times_as_much_at_most(apart, allowed):
    values = iter([1.0, 1.0, 1.0 + apart, *[1.0] * 20])
    found = rounding(nn.Linear(2, 2), lambda: torch.tensor([next(values)], dtype=torch.float64))
    assert found == pytest.approx(allowed, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "by"), [(torch.float32, 8 * 2**-23), (torch.float64, 8 * 2**-52), (torch.bfloat16, 2**-7)]
)
def test_outputs_are_moved_by_a_few_units_in_the_last_place(dtype, by):
    model, usual = nn.Sequential(nn.Identity()), {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
    model.register_parameter("kind", nn.Parameter(torch.ones((), dtype=dtype)))
    factor = 3 * usual / by
    found = rounding(model, lambda: 1 + factor * (model(torch.ones(64, dtype=dtype)).double() - 1))
    assert found == pytest.approx(3 * usual)  # one of 64 goes either way
    assert not model[0]._forward_hooks


def test_a_model_that_cannot_be_disturbed_gets_what_is_usual():
    model = nn.Sequential(nn.Identity())

    def logits():
        if not torch.equal(model(torch.ones(4)), torch.ones(4)):
            raise RuntimeError("looks its tokens up by their bits")
        return torch.ones(4)

    assert rounding(model, logits) == 1e-5
    assert not model[0]._forward_hooks


def test_without_a_tolerance_rounding_is_allowed():
    subject, one = SimpleNamespace(rounding=0.25), torch.ones(2)
    assert compare(subject, one, one * 1.5) == Measured(0.5, 0.25)
    assert compare(subject, one, one, 0.0) == Measured(0.0, 0.0)


# -- gradients, copies, kernels, caches --------------------------------------------------------------------------------


def test_gradients_are_apart_by_the_largest_and_infinitely_where_one_is_missing():
    one, two = torch.ones(2), torch.tensor([1.0, 2.0])
    assert training._distance((one, (one, None)), (one, (one, None))) == 0
    assert training._distance((one, (one, None)), (one, (None, None))) == float("inf")
    assert training._distance((one, (None, two)), (one, (None, two * 1.5))) == 0.5
    assert training._distance((one, (two * 1.25, two)), (one * 4, (two, two))) == 3.0
    assert training._distance((one, (two, two)), (one, (two * 1.5, two * 1.25))) == 0.5


def test_parameters_without_a_gradient_are_counted_and_named():
    subject = _subject("llama")
    for layer, name in ((0, "k_proj"), (1, "v_proj")):
        module = getattr(subject.model.model.layers[layer].self_attn, name)
        module.register_forward_hook(lambda m, a, out: out.detach())
    found = training.gradients_arrive(subject)
    assert (found.figure, found.tolerance) == (2, 0)
    names = "model.layers.0.self_attn.k_proj.weight, model.layers.1.self_attn.v_proj.weight"
    assert found.what == f"of 8 parameters are without: {names}"


@pytest.mark.parametrize("names", [("gradient",), ("gradient", "activation")])
def test_checkpointing_is_switched_by_the_name_there_is(names):
    called = []
    switches = {
        f"{kind}_checkpointing_{way}": lambda kind=kind, way=way: called.append((kind, way))
        for kind in names
        for way in ("enable", "disable")
    }
    training._checkpoint(SimpleNamespace(**switches), True)
    training._checkpoint(SimpleNamespace(**switches), False)
    assert called == [(names[-1], "enable"), (names[-1], "disable")]


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_shown_again_where_they_were(shown):
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with contextlib.suppress(KeyboardInterrupt), copies._no_progress_bars():
            assert not logging.is_progress_bar_enabled()
            raise KeyboardInterrupt
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _dispatching(implementation):
    config = SimpleNamespace(_attn_implementation=implementation)
    model = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    one = torch.ones(2)
    return SimpleNamespace(
        model=model, anatomy=SimpleNamespace(sites=(), dispatching=()), logits=lambda: one, rounding=1e-9
    )


def test_kernels_are_compared_where_there_is_another(monkeypatch):
    asked = []
    monkeypatch.setattr(
        kernels, "_under", lambda subject, edit: asked.append(edit.implementation) or torch.tensor([1.0, 1.5])
    )
    assert kernels.eager_agrees(_dispatching("eager")) == "it is the present one"
    assert kernels.eager_agrees(_dispatching("attnpatch_eager")) == "it is the present one"
    assert kernels.eager_agrees(_dispatching(FUSED)) == "its forwards stay, and only ask for masks"
    assert asked == []
    assert kernels.eager_agrees(_dispatching("attnpatch_sdpa")) == Measured(0.5, 1e-5)  # eager sums in fp32
    assert asked == ["attnpatch_eager"]


def test_a_kernel_that_cannot_be_had_is_no_failure(monkeypatch):
    monkeypatch.setattr(kernels, "_under", lambda subject, name: None)
    assert "chooses its attention when it is built" in kernels.eager_agrees(_dispatching("sdpa"))

    def refused(subject, name):
        raise ImportError("not\nhere " + "x" * 300)

    monkeypatch.setattr(kernels, "_under", refused)
    found = kernels.eager_agrees(_dispatching("sdpa"))
    assert found.startswith("it refuses: not here x")
    assert len(found) == 160
    subject = _dispatching("eager")
    subject.model._supports_sdpa = False
    assert "does not dispatch to it" in kernels.sdpa_agrees(subject)


@pytest.mark.parametrize(
    ("found", "rereads", "outcome"),
    [(1.2, False, Measured(0.2, 0.25)), (1.3, False, NoCache), (1.3, True, "there is no cache"), (1.25, True, None)],
)
def test_a_model_that_hands_no_cache_back_has_to_prove_why(found, rereads, outcome, monkeypatch):
    def pieces(*_):
        raise NoCache("none", torch.full((1, 4), found))

    subject = SimpleNamespace(
        model=nn.Linear(1, 1), tokens=torch.ones(1, 4), inputs={}, rounding=0.25, generates=True,
        logits=lambda inputs=None: torch.ones(1, 4),
    )  # fmt: skip
    monkeypatch.setattr(decoding, "in_pieces", pieces)
    monkeypatch.setattr(decoding, "rereads", lambda model, inputs: rereads)
    if outcome is NoCache:
        with pytest.raises(NoCache):
            decoding.decoded_token_by_token(subject)
    elif isinstance(outcome, str):
        assert decoding.decoded_token_by_token(subject).endswith(outcome)
    else:
        measured = decoding.decoded_token_by_token(subject)
        assert measured.figure == pytest.approx(found - 1, rel=1e-5)
        assert measured.tolerance == 0.25


def test_decoding_is_asked_of_what_generates_and_takes_every_token(monkeypatch):
    subject, asked = _dispatching("eager"), []
    subject.generates, subject.tokens, subject.inputs = False, torch.ones(2, 7), {}
    assert decoding.decoded_in_two_chunks(subject) == "it does not generate"
    subject.generates, subject.model = True, nn.Linear(1, 1)
    monkeypatch.setattr(decoding, "in_pieces", lambda model, inputs, sizes: asked.append(sizes) or torch.ones(2))
    decoding.decoded_in_two_chunks(subject)
    decoding.decoded_token_by_token(subject)
    assert asked == [[3, 4], [1] * 7]
