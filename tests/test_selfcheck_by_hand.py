"""How ``apply`` asks whether decoding equals the full forward: every answer, without a model that computes."""

import contextlib
import types

import pytest
import torch
from torch import nn

from hf_attnpatch import selfcheck
from hf_attnpatch.errors import SelfCheckFailed
from hf_attnpatch.selfcheck import NO_CACHE, decoded_with, decoding
from hf_attnpatch.stepwise import NoCache
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import Roles

NAMES = {
    **{words.TOKENS: "ids", words.MASK: "mask", words.POSITIONS: "places"},
    **{words.DECODER_TOKENS: "second", words.USE_CACHE: "caching"},
}
IDS = torch.arange(20).view(2, 10)
MASK = torch.tensor([[0, 0, *[1] * 8], [1] * 10])
TEXT = {"ids": IDS, "mask": MASK}
SAID = "a prefill and steps of 1 and 2 tokens equal the full forward"


class Model(nn.Module):
    """Its logits are its tokens; it notes with what it was called."""

    def __init__(self, generates=True):
        super().__init__()
        self.generates, self.calls = generates, []

    def can_generate(self):
        return self.generates

    def forward(self, **given):
        self.calls.append(given)
        return types.SimpleNamespace(logits=given["second" if "second" in given else "ids"].float())


@pytest.fixture
def ask(monkeypatch):
    """A model whose forward has these roles, whose cached decoding gives ``found``, or raises it."""

    def make(found=None, roles=tuple(NAMES), short=None, **more):
        told = types.SimpleNamespace(sizes=[], caches=["first", "last"], tried=[], asked=[])
        names = {role: NAMES[role] for role in roles}
        known = Roles("Model", tuple(names.values()), names, {}, True)
        monkeypatch.setattr(selfcheck, "roles_of", lambda model: known)
        monkeypatch.setattr(selfcheck, "predicted", lambda output: output.logits)
        monkeypatch.setattr(selfcheck, "quiet", contextlib.nullcontext)
        monkeypatch.setattr(selfcheck, "one_of_each", lambda model, sites: short)
        monkeypatch.setattr(selfcheck, "valid", lambda model, logits, given: logits)
        monkeypatch.setattr(selfcheck, "rounding", lambda model, again: told.asked.append(again()) or 0.01)

        def in_pieces(model, given, sizes, seen):
            told.sizes.append((sorted(given), sizes))
            result = found(len(told.sizes)) if callable(found) else found
            if isinstance(result, Exception):
                raise result
            for cache in told.caches:
                seen(cache)
            return model(**given).logits if result is None else result

        @contextlib.contextmanager
        def tried(model, edits):
            told.tried.append(edits)
            yield

        monkeypatch.setattr(selfcheck, "in_pieces", in_pieces)
        monkeypatch.setattr(selfcheck, "tried", tried)
        for name, value in more.items():
            monkeypatch.setattr(selfcheck, name, value)
        return told

    return make


WRONG = IDS.float() * 2
SHORT = types.SimpleNamespace(count=3)


def test_a_model_that_does_not_generate_is_not_asked(ask):
    told = ask()
    assert decoding(Model(generates=False), TEXT, ()) == (None, "the model does not generate")
    assert decoded_with(Model(generates=False), TEXT) is None
    assert not told.sizes


@pytest.mark.parametrize(
    ("length", "steps", "sizes"),
    [(10, (1, 1, 2), [6, 1, 1, 2]), (5, (1, 1, 2), [1, 1, 1, 2]), (4, (1, 1, 2), [1] * 4), (3, (1, 1), [1, 1, 1])],
)
def test_sizes_of_the_pieces(length, steps, sizes, ask):
    told = ask()
    found, said = decoding(Model(), {"ids": IDS[:, :length]}, (), steps=steps)
    assert found is None
    assert told.sizes == [(["ids"], sizes)]
    assert said == SAID.replace("1 and 2", "1" if steps == (1, 1) else "1 and 2") + ", one row left-padded"


def test_of_two_sequences_the_second_is_cut(ask):
    told = ask()
    decoding(Model(), {"ids": IDS[:, :4], "second": IDS[:, :8]}, ())
    assert told.sizes == [(["ids", "second"], [4, 1, 1, 2])]


def test_the_full_forward_is_one_without_a_cache(ask):
    ask()
    model = Model()
    decoding(model, TEXT, ())
    assert model.calls[0]["caching"] is False
    assert "caching" not in model.calls[1]


def test_positions_are_those_that_generate_passes(ask):
    ask()
    model = Model()
    decoding(model, TEXT, ())
    assert model.calls[0]["places"].tolist() == [[0, 0, *range(8)], [*range(10)]]
    given = {**TEXT, "places": IDS}
    decoding(model, given, ())
    assert model.calls[2]["places"] is IDS  # that are given
    decoding(model, {"ids": IDS}, ())  # and no mask to count by
    decoding(model, {**TEXT, "image": IDS}, ())  # which may have positions of its own kind
    ask(roles=(words.TOKENS, words.MASK))
    decoding(model, TEXT, ())  # which takes none
    assert all("places" not in call for call in model.calls[4:])


# -- first layers, then all --------------------------------------------------------------------------------------------


def test_the_first_layers_are_enough_where_they_agree(ask):
    told = ask(short=SHORT)
    assert decoding(Model(), TEXT, ()) == (None, f"{SAID}, one row left-padded, in the first 3 of its layers")
    assert told.tried == [[SHORT]]
    assert len(told.sizes) == 1


@pytest.mark.parametrize("whole", [None, WRONG])
def test_all_layers_are_asked_where_the_first_disagree(whole, ask):
    told = ask(lambda n: WRONG if n == 1 else whole, short=SHORT)
    problem, said = decoding(Model(), TEXT, ())
    assert said == f"{SAID}, one row left-padded"
    assert len(told.sizes) == 2
    assert (problem is None) == (whole is None)
    assert whole is None or problem.startswith("logits differ by 1 of their size")


def test_a_promise_is_about_all_layers_and_sees_the_last_cache(ask):
    told, seen = ask(short=SHORT), []
    decoding(Model(), TEXT, (), [seen.append])
    assert seen == ["last"]
    assert not told.tried
    with pytest.raises(SelfCheckFailed, match=r"^it keeps all\. The model is unchanged\.$"):
        decoding(Model(), TEXT, (), [lambda cache: None, lambda cache: "it keeps all"])
    told.caches.clear()
    assert decoding(Model(), TEXT, (), [lambda cache: "it keeps all"])[0] is None  # there is none to be shown


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "fine"), [(0.0, True), (1e-6, True), (0.005, True), (0.0099, True), (0.011, False), (0.5, False)]
)
def test_rounding_as_it_was_measured_is_allowed(by, fine, ask):
    told = ask(lambda n: IDS.float() * (1 + by))
    problem, _ = decoding(Model(), TEXT, ())
    assert (problem is None) is fine
    assert len(told.asked) == (by >= 0.005)  # it is measured where the usual is not enough


@pytest.mark.parametrize(
    ("found", "words_of_it"), [(WRONG[:, :3], "shape"), (WRONG * float("nan"), "not finite")], ids=["shape", "nan"]
)
def test_no_rounding_explains_another_shape_or_what_is_not_finite(found, words_of_it, ask):
    told = ask(found)
    assert words_of_it in decoding(Model(), TEXT, ())[0]
    assert words_of_it in decoded_with(Model(), TEXT)
    assert not told.asked


ERRORS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError)


@pytest.mark.parametrize("error", ERRORS)
def test_a_failure_is_what_is_wrong(error, ask):
    ask(error("a\n  b " + "x" * 300))
    problem, said = decoding(Model(), TEXT, ())
    assert problem.startswith(f"decoding with a cache fails ({error.__name__}: a b xxx")
    assert len(problem) == len("decoding with a cache fails ()") + 200
    assert said == f"{SAID}, one row left-padded"
    assert decoded_with(Model(), TEXT) == problem


# -- no cache at all ---------------------------------------------------------------------------------------------------


STATE = "modules keep their own state, by which single steps equal the full forward"
REMEMBERS = "modules keep their own state; the tokens of generate are those of full forwards"


def _raise(*_):
    raise ValueError


@pytest.mark.parametrize(
    ("found", "again", "keeps", "writes", "said", "asked"),
    [
        (IDS.float(), False, False, False, STATE, ""),  # each piece by itself was right
        (WRONG, True, False, False, NO_CACHE, "again"),
        (WRONG, False, True, True, REMEMBERS, "again keeps writes"),
        (WRONG, False, True, False, None, "again keeps writes"),
        (WRONG, False, False, True, None, "again keeps"),
    ],
)
def test_a_model_without_a_cache_has_to_prove_why(found, again, keeps, writes, said, asked, ask):
    shown = []
    ask(
        NoCache("none that it takes again.", found),
        rereads=lambda model, inputs: shown.append(("again", sorted(inputs))) or again,
        remembers=lambda model, inputs: shown.append(("keeps", sorted(inputs))) or keeps,
        writes_as_it_reads=lambda model, inputs: shown.append(("writes", sorted(inputs))) or writes,
    )
    given = {**TEXT, "image": IDS, "second": IDS}
    if said is None:
        with pytest.raises(SelfCheckFailed, match="none that it takes again.* could not be checked; the model is unch"):
            decoding(Model(), given, ())
    else:
        assert decoding(Model(), given, ()) == (None, said)
    inputs = {"writes": ["ids"]}  # and no mask: it is not padded
    assert shown == [(what, inputs.get(what, ["ids", "image", "second"])) for what in asked.split()]


@pytest.mark.parametrize("which", ["rereads", "remembers", "writes_as_it_reads"])
def test_what_does_not_generate_proves_nothing(which, ask):
    fine = {"rereads": lambda *_: False, "remembers": lambda *_: True, "writes_as_it_reads": lambda *_: True}
    ask(NoCache("no cache.", WRONG), **{**fine, which: _raise})
    with pytest.raises(SelfCheckFailed, match="no cache"):
        decoding(Model(), TEXT, ())


def test_inputs_beside_text_are_decoded_without_padding(ask):
    ask(WRONG, unmasked=lambda model, given: {"ids": IDS})
    model = Model()
    assert decoded_with(model, {**TEXT, "image": IDS}).startswith("logits differ by 1")
    assert sorted(model.calls[0]) == ["caching", "ids"]
    assert decoded_with(model, {"image": IDS}) is None  # with no tokens there is nothing to decode
    ask(unmasked=lambda model, given: given)
    assert decoded_with(model, {"ids": IDS}) is None
    assert decoded_with(model, {"ids": IDS, "second": IDS}) is None
    ask(NoCache("no cache.", IDS.float()), unmasked=lambda model, given: given)
    assert decoded_with(model, {"ids": IDS}) is None
    ask(NoCache("no cache.", WRONG), unmasked=lambda model, given: given)
    assert decoded_with(model, {"ids": IDS}).startswith("logits differ by 1")
