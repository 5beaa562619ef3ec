"""The small parts of the attention room, and what positions count: no model, every answer written out."""

import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hf_attnpatch.attention import heads, registry
from hf_attnpatch.attention.alibi import NoBias
from hf_attnpatch.attention.call import AttentionCall
from hf_attnpatch.attention.deferring import DeferAttention
from hf_attnpatch.attention.noted import LazyStates
from hf_attnpatch.attention.registry import FUSED, Guard, Keeper, chosen, dense, keep_wrappers, kernel_of
from hf_attnpatch.attention.wrapper import (
    HELD,
    AddWrapper,
    RemoveWrapper,
    Term,
    Wrapper,
    term_of,
    without,
    wrapped,
    wrapper_of,
    wrappers_of,
)
from hf_attnpatch.edits import AddPreHook, SetAttention
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.positions import choice, fusing
from hf_attnpatch.positions import strength as strengths
from hf_attnpatch.positions.counting import Counting, _ways
from hf_attnpatch.positions.strength import set_alibi_strength
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import Roles


class _Far(Wrapper):
    name, order = "far", 1


class _Near(Wrapper):
    name, order = "near", 2

    def __init__(self, mark=0):
        self.mark = mark


class _Term(Term):
    name, what = "term", "a term"

    def attend(self, call, sight):
        return call.query


def module(*wrappers, **fields):
    made = nn.Linear(1, 1)
    vars(made).update(fields)
    if wrappers:
        setattr(made, HELD, wrappers)
    return made


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_wrappers_stand_in_their_order_and_one_of_a_name():
    far, near, later, term = _Far(), _Near(), _Near(1), _Term()
    assert wrappers_of(module()) == ()
    assert wrapped(module(near), far) == (far, near)
    assert wrapped(module(far, near, term), later) == (far, later, term)
    assert without(module(far, near), "far") == (near,)
    assert without(module(far, near), "nobody") == (far, near)
    assert wrapper_of(module(far, near), _Near) is near
    assert wrapper_of(module(far), _Near) is None
    assert wrapper_of(module(far, term), Term) is term


def test_a_wrapper_is_put_on_and_taken_off_again():
    owner, far, near, later = nn.Sequential(module()), _Far(), _Near(), _Near(1)
    first = AddWrapper("0", near).run(owner)
    second = AddWrapper("0", later).run(owner)
    third = AddWrapper("0", far).run(owner)
    assert wrappers_of(owner[0]) == (far, later)
    assert AddWrapper("0", near).preview(owner)[0].startswith("<test_attention_by_hand._Near object")
    assert AddWrapper("0", _Term()).preview(owner)[0] == "-"
    gone = RemoveWrapper("0", "near").run(owner)
    assert wrappers_of(owner[0]) == (far,)
    for write in (gone, third, second):
        write.undo()
    assert wrappers_of(owner[0]) == (near,)
    first.undo()
    assert HELD not in vars(owner[0])
    assert AddWrapper("0", near).claim == RemoveWrapper("0", "near").claim == "attention wrapper near at 0"


def call(owner=None, term=None, kernel="sdpa", **given):
    states = (torch.ones(2, 4, 3, 16), torch.ones(2, 2, 5, 16), torch.ones(2, 2, 5, 8))
    return AttentionCall(kernel, owner or module(), *states, "mask", given, term)


def test_what_is_added_is_the_module_s_own_or_goes_with_the_call():
    mine, theirs = _Term(), _Term()
    assert term_of(call(module(mine), theirs)) is mine
    assert term_of(call(module(_Near()), theirs)) is theirs
    assert term_of(call()) is None
    for way in ("dense", "flex", "flash"):
        arguments = {"dense": (None,), "flex": (), "flash": (True,)}[way]
        with pytest.raises(AttnPatchError, match="Linear: odd does not compute a term; use 'sdpa'"):
            getattr(mine, way)(call(kernel="odd"), *arguments)
    assert Wrapper().around(call(), lambda given: given.mask) == "mask"


# -- a call ------------------------------------------------------------------------------------------------------------


def test_a_call_with_other_parts_keeps_the_rest():
    first, term = call(scaling=2.0), _Term()
    first.term = term
    for part in ("query", "key", "value"):
        other = torch.zeros(1)
        found = first.but(**{part: other})
        assert getattr(found, part) is other
        kept = {name: getattr(first, name) for name in ("query", "key", "value") if name != part}
        assert all(getattr(found, name) is tensor for name, tensor in kept.items())
        assert (found.kernel, found.module, found.mask, found.given, found.term) == (
            *("sdpa", first.module, "mask"),
            *({"scaling": 2.0}, term),
        )
    assert first.but(given={}).given == {}
    assert first.but(given={}).query is first.query
    bare = first.masked(None)
    assert (bare.mask, bare.given, bare.term, bare.kernel) == (None, {"scaling": 2.0}, term, "sdpa")
    assert bare.query is first.query
    assert bare.key is first.key
    assert bare.value is first.value


def test_what_a_call_leaves_open():
    assert call().scale == 0.25
    assert call(scaling=2).scale == 2.0
    assert call(dropout=None).dropout == call().dropout == 0.0
    assert call(dropout=0.3).dropout == 0.3
    assert call().causal is True
    assert call(module(is_causal=False)).causal is False
    assert call(module(is_causal=False), is_causal=True).causal is True
    assert call(module(is_causal=True), is_causal=False).causal is False


def test_what_a_kernel_cannot_compute_is_refused_by_name():
    fine = call(softcap=None, dropout=0.0)
    fine.refuse("ALiBi", words.SOFTCAP, words.DROPOUT, words.SINKS)
    call(softcap=0.0).refuse("ALiBi", words.DROPOUT)
    for given in ({"softcap": 0.0}, {"dropout": 0.1}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(AttnPatchError, match=f"Linear passes {next(iter(given))} to its .* together with ALiBi"):
            call(**given).refuse("ALiBi", words.SOFTCAP, words.DROPOUT, words.SINKS)


# -- names of kernels --------------------------------------------------------------------------------------------------


def test_names_of_kernels_with_and_without_wrappers():
    assert (kernel_of("attnpatch_sdpa"), kernel_of("sdpa")) == ("sdpa", "sdpa")
    assert (dense("attnpatch_flash_attention_2"), dense("sdpa"), dense("eager")) == (
        "attnpatch_eager",
        "eager",
        "eager",
    )
    plain, owner = nn.Sequential(module()), nn.Sequential(module(_Near()))
    ours = SetAttention("", "attnpatch_sdpa", registry.register, otherwise=registry.TORCH)
    assert chosen(plain, "sdpa") == ours  # whose family does not say that it takes it
    vars(plain)[words.DECLARES_SDPA] = vars(owner)[words.DECLARES_SDPA] = True
    assert chosen(plain, "sdpa") == SetAttention("", "sdpa")
    assert chosen(owner, "sdpa") == ours
    assert chosen(plain, "eager") == SetAttention("", "eager")
    assert chosen(owner, "eager") == SetAttention("", "attnpatch_eager", registry.register)
    assert chosen(owner, "somebody/kernel") == SetAttention("", "somebody/kernel")
    kept = [types.SimpleNamespace(_attn_implementation=name) for name in ("sdpa", "attnpatch_eager", "other")]
    keep_wrappers(kept[0])
    Keeper(kept[1:])(None, (), {})
    assert [one._attn_implementation for one in kept] == ["attnpatch_sdpa", "attnpatch_eager", "other"]


@pytest.mark.parametrize(
    ("name", "held", "stopped"),
    [("sdpa", True, True), ("attnpatch_sdpa", True, False), ("sdpa", False, False), ("eager", True, True)],
)
def test_a_guard_stops_where_a_wrapper_would_be_passed_over(name, held, stopped):
    guard = Guard(types.SimpleNamespace(_attn_implementation=name))
    owner = module(*((_Far(), _Near()) if held else ()))
    if not stopped:
        assert guard(owner, (), {}) is None
        return
    with pytest.raises(AttnPatchError, match=f"Linear: .* '{name}' knows nothing of this model's far, near, and would"):
        guard(owner, (), {})


@pytest.mark.parametrize(
    ("sharded", "here", "whole", "found"),
    [
        (None, 8, 8, slice(None)),
        ((2, 4), 2, 8, slice(4, 6)),
        ((0, 2), 4, 8, slice(0, 4)),
        ((1, 1), 8, 8, slice(None)),
        ((1, 2), 2, 8, None),
        (None, 4, 8, None),
    ],
)
def test_the_heads_of_a_rank(sharded, here, whole, found, monkeypatch):
    monkeypatch.setattr(heads, "sharding", lambda module: sharded)
    if found is not None:
        assert heads.share(module(), here, whole) == found
        return
    rank, ranks = sharded or (0, 1)
    with pytest.raises(
        AttnPatchError, match=f"queries of {here} heads on rank {rank} of {ranks}, .* has {whole} heads; cannot tell"
    ):
        heads.share(module(), here, whole)
    with pytest.raises(AttnPatchError, match="on rank 0 of 1"):
        heads.share(None, 1, 2)


# -- what stands for a tensor ------------------------------------------------------------------------------------------


@dataclass
class _Scores(LazyStates):
    shadow: torch.Tensor
    did: tuple = ()

    def _on_softmax(self, noted, dim=None, **more):
        return ("softmax", noted, dim)


@dataclass
class _Weights(_Scores):
    knows_more: ClassVar[bool] = True

    def _on_add(self, first, second):
        return ("add", first, second)


def _noted(kind=_Scores, dtype=torch.bfloat16):
    return kind(torch.zeros(2, 3, 4, dtype=dtype, device="meta"), ("kept",))


def test_what_is_noted_looks_like_a_tensor():
    one = _noted()
    assert (tuple(one.shape), one.dtype, one.dim(), one.size(-1)) == ((2, 3, 4), torch.bfloat16, 3, 4)
    assert one.size() == (2, 3, 4)
    assert tuple(one.transpose(0, 2).shape) == (4, 3, 2)
    assert tuple(one.view(6, 4).shape) == tuple(one.reshape(-1, 4).shape) == (6, 4)
    assert (one.float().dtype, one.to("cpu", dtype=torch.float64).dtype) == (torch.float32, torch.float64)
    assert one.to(torch.float16).dtype == torch.float16
    assert one.to("cpu") is one
    assert one.contiguous() is one
    assert one.transpose(0, 1).did == one.float().did == one.view(24).did == ("kept",)
    with pytest.raises(AttributeError, match="masked_fill of _scores of attention, which is computed fused"):
        one.masked_fill(0, 1)
    with pytest.raises(NotImplementedError, match="_Scores holds no tensor"):
        _ = one.device


def test_what_is_done_to_it_is_asked_of_the_one_that_knows_most():
    scores, weights, plain = _noted(), _noted(_Weights), torch.ones(1)
    assert torch.softmax(scores, -1) == ("softmax", scores, -1)
    assert torch.nn.functional.softmax(scores, dim=1)[2] == 1
    for first, second in ((scores, weights), (weights, scores), (plain, weights), (weights, plain)):
        assert torch.add(first, second) == ("add", first, second)
    with pytest.raises(NotImplementedError, match="add on _scores of attention, which is computed fused"):
        torch.add(plain, scores)
    with pytest.raises(NotImplementedError, match="matmul on _weights of attention"):
        torch.matmul(scores, other=weights)


# -- forwards that compute scores by themselves ------------------------------------------------------------------------

OWN = {words.STATES: "x", words.CACHE: "kept", words.BIAS: "alibi"}


@pytest.fixture
def own(monkeypatch):
    """A model of two such modules and one in a tower, each with this many roles."""

    def make(roles=OWN, there=False, **fields):
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
        known = Roles("Own", tuple(roles.values()), roles, {}, False)
        monkeypatch.setattr(fusing, "roles_of", lambda module: known)
        monkeypatch.setattr(fusing, "config_at", lambda model, path: f"config at {path}")
        if there:
            model[0].register_forward_pre_hook(DeferAttention(known, "config at text", FUSED, False), with_kwargs=True)
        site = {"kind": "Own", "dispatches": False, "cross": False, "tower": False, "config": "text"}
        sites = [
            types.SimpleNamespace(path=str(n), **{**site, "tower": n == 2, **fields.pop("site", {})}) for n in (0, 1, 2)
        ]
        given = {"architecture": "Model", "sites": sites, "unread": {}, "other": {}, **fields}
        return model, types.SimpleNamespace(**given)

    return make


def _read(edits):
    """Edits as (path, what hangs there, whether a bias counts)."""
    hooks = [(e.path, type(e.hook), e.hook.unbiased, e.hook.config) for e in edits if isinstance(e, AddPreHook)]
    wrappers = [(e.path, e.wrapper) for e in edits if isinstance(e, AddWrapper)]
    return wrappers, hooks, [e for e in edits if isinstance(e, SetAttention)]


MASKS = SetAttention("", FUSED, registry.register, True, ("", "text"))


def test_ways_in_which_scores_go_to_a_fused_kernel(own):
    for roles, ways in ((OWN, (False, True)), ({words.STATES: "x", words.CACHE: "kept"}, (False,))):
        found = fusing.variants(*own(roles))
        for edits, unbiased in zip(found, ways, strict=True):
            hooks = [(str(n), DeferAttention, unbiased, "config at text") for n in (0, 1)]
            assert _read(edits) == ([], hooks, [MASKS])
            assert edits[-1] == MASKS


@pytest.mark.parametrize("there", [False, True])
def test_what_is_put_around_them_stands_before_the_hooks_that_are_made_once(there, own):
    hooks = [] if there else [(str(n), DeferAttention, False, "config at text") for n in (0, 1)]
    masks = [] if there else [MASKS]
    wrapper = _Near()
    for found, held in (
        (fusing.deferred(*own(there=there)), []),
        (fusing.rebiased(*own(there=there), wrapper), [("0", wrapper), ("1", wrapper)]),
        (fusing.rotated(*own(there=there), wrapper), [("0", wrapper), ("1", wrapper)]),
    ):
        assert _read(found) == (held, hooks, masks)
    held, *rest = _read(fusing.unbiased(*own(there=there)))
    assert [(path, type(one)) for path, one in held] == [("0", NoBias), ("1", NoBias)]
    assert rest == [hooks, masks]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"roles": {words.STATES: "x"}}, "0: Own is no self-attention with a cache"),
        ({"site": {"dispatches": True}}, "0: Own is no self-attention with a cache"),
        ({"site": {"cross": True}}, "0: Own is no self-attention with a cache"),
        ({"unread": {"7": "is odd"}}, "7: is odd"),
        ({"other": {"8": "is none"}, "unread": {"7": "is odd"}}, "8: is none"),
        ({"sites": []}, "Model: no attention module was read"),
    ],
)
def test_why_scores_cannot_go_there(fields, why, own):
    for ask in (fusing.variants, fusing.unbiased, fusing.deferred):
        assert ask(*own(**fields)).startswith(why)
    for ask in (fusing.rebiased, fusing.rotated):
        assert ask(*own(**fields), _Near()).startswith(why)


@pytest.mark.parametrize("strength", [-1, -0.1, float("inf"), float("nan"), "1", None])
def test_what_is_no_strength(strength):
    with pytest.raises(AttnPatchError, match=r"strength is .*; it must be a number, 0 or more"):
        set_alibi_strength(None, strength)


def test_a_strength_is_set_in_every_module_and_in_the_record(monkeypatch):
    biases = [types.SimpleNamespace(strength=1.0) for _ in range(2)]
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    specs = [{"patch": "alibi", "strength": 1.0}, {"patch": "flash"}]
    model.config = types.SimpleNamespace(attnpatch={"patches": specs})
    monkeypatch.setattr(strengths, "describe", lambda model: types.SimpleNamespace(biased=("0", "2")))
    monkeypatch.setattr(strengths, "alibi_of", lambda module: biases[[model[0], model[2]].index(module)])
    for given in (0, 0.5, 7):
        set_alibi_strength(model, given)
        assert [bias.strength for bias in biases] == [given] * 2
        assert specs == [{"patch": "alibi", "strength": given}, {"patch": "flash"}]
    monkeypatch.setattr(strengths, "describe", lambda model: types.SimpleNamespace(biased=()))
    with pytest.raises(AttnPatchError, match="Sequential has no ALiBi of this package; apply patch_alibi first"):
        set_alibi_strength(model, 0.5)


# -- positions ---------------------------------------------------------------------------------------------------------

NAMES = {
    **{words.TOKENS: "ids", words.EMBEDDINGS: "embeds", words.MASK: "mask"},
    **{words.POSITIONS: "places", words.CACHE: "kept"},
}
DECODER = Roles("Decoder", tuple(NAMES.values()), NAMES, {}, True)
IDS = torch.zeros(2, 4, dtype=torch.long)
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def filled(tokens, ways=None):
    cache = DynamicCache()
    if tokens:
        cache.update(torch.zeros(2, 1, tokens, 1), torch.zeros(2, 1, tokens, 1), 0)
    if ways is not None:
        cache.attnpatch_counting = frozenset(ways)
    return cache


def ways(**given):
    found = _ways(DECODER.bind((), {NAMES[role]: value for role, value in given.items()}))
    return found if found is None else set(found)


BOTH = {("tokens", 0), ("columns", 0)}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, BOTH),
        ({"positions": [[0, 1, 2, 3]]}, BOTH),
        ({"positions": [[5, 6, 7, 8]]}, BOTH),  # nothing goes on from there
        ({"positions": [[5, 6, 7, 8]], "past": 0}, {("tokens", 5), ("columns", 5)}),
        ({"positions": [[0, 1, 3, 4]]}, set()),
        ({"positions": [[0, 1, 0, 1]]}, set()),
        ({"mask": LEFT, "positions": [[0, 0, 0, 1], [0, 1, 2, 3]]}, {("tokens", 0)}),
        ({"mask": LEFT, "positions": [[0, 1, 2, 3]]}, {("tokens", 0)}),  # each row from its own first token
        ({"mask": LEFT, "positions": [[0, 0, 0, 1], [0, 1, 2, 3]], "past": 0}, {("tokens", 0)}),
        ({"mask": LEFT, "positions": [[0, 1, 2, 3]], "past": 0}, {("columns", 0)}),
        ({"mask": LEFT, "past": 0}, {("columns", 0)}),  # without positions, columns count
        ({"positions": [[6, 7, 8, 9]], "past": 6}, BOTH),
        ({"positions": [[4, 5, 6, 7]], "past": 6}, {("tokens", -2), ("columns", -2)}),
        ({"past": 6}, BOTH),
        ({"mask": torch.zeros(2, 4, dtype=torch.long)}, None),  # nothing but padding
        ({"mask": torch.zeros(2, 1, 4, 4), "positions": [[0, 1, 3, 4]]}, set()),
        ({"mask": torch.zeros(2, 1, 4, 4), "positions": [[0, 1, 2, 2]]}, None),
        ({"positions": [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]}, BOTH),  # axes that agree
        ({"positions": [[[0, 1, 2, 3]], [[0, 1, 1, 1]]]}, set()),
        ({"mask": LEFT, "positions": [[[9, 9, 0, 1], [0, 1, 2, 3]], [[7, 7, 0, 1], [0, 1, 2, 3]]]}, {("tokens", 0)}),
    ],
)
def test_what_positions_count(given, found):
    given = dict(given)
    past = given.pop("past", None)
    if "positions" in given:
        given["positions"] = torch.tensor(given["positions"])
    if past is not None:
        given["cache"] = filled(past)
        if "mask" in given and past:
            given["mask"] = torch.cat([torch.ones(2, past, dtype=torch.long), given["mask"]], 1)
    assert ways(tokens=IDS, **given) == found
    assert ways(embeddings=torch.zeros(2, 4, 8), **given) == found


def test_a_row_goes_on_where_its_tokens_stopped():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    given = {"tokens": IDS, "mask": mask, "cache": filled(3)}
    assert ways(**given, positions=torch.tensor([[1, 2, 3, 4], [3, 4, 5, 6]])) == {("tokens", 0)}
    assert ways(**given, positions=torch.tensor([[3, 4, 5, 6]])) == {("columns", 0)}
    assert ways(**given, positions=torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])) == set()
    assert ways(cache=filled(3)) is None  # no tokens to tell by


def looks(given, turned=False, held=True, cache=None, memory=False):
    """Let the hook of a decoder look at a call."""
    owner = nn.Sequential(nn.Linear(1, 1))
    if memory:
        owner.register_forward_pre_hook(types.SimpleNamespace(gave_positions=True))
    hook = Counting(DECODER, turned, "0", lambda module: module if held and module is owner[0] else None)
    named = {NAMES[role]: torch.tensor(value) for role, value in given.items()}
    hook(owner, (), {"ids": IDS, **named, **({} if cache is None else {"kept": cache})})


GAPS = {"positions": [[0, 1, 3, 4]]}
SHOWN = {**GAPS, "mask": [[1] * 4] * 2}


@pytest.mark.parametrize(
    ("given", "options", "refused"),
    [
        (SHOWN, {}, True),
        (GAPS, {}, False),  # without a mask and a cache they say where documents are
        (SHOWN, {"held": False}, False),
        (SHOWN, {"memory": True}, False),
        ({**SHOWN, "positions": [[[0, 1, 3, 4]], [[0, 1, 3, 4]]]}, {}, False),  # an image's, that turn nothing here
        ({**SHOWN, "positions": [[[0, 1, 3, 4]], [[0, 1, 3, 4]]]}, {"turned": True}, True),
        ({}, {"cache": filled(4, {("tokens", 0)})}, False),
        ({"positions": [[4, 5, 6, 7]]}, {"cache": filled(4, {("tokens", 0)})}, False),
        ({"positions": [[5, 6, 7, 8]]}, {"cache": filled(4, {("tokens", 0)})}, True),
        ({"positions": [[5, 6, 7, 8]]}, {"cache": filled(4)}, False),
        ({"positions": [[5, 6, 7, 8]]}, {"cache": filled(0, {("tokens", 0)})}, False),  # begun anew
    ],
)
def test_positions_that_distances_do_not_follow_are_refused(given, options, refused):
    if not refused:
        looks(given, **options)
        return
    with pytest.raises(AttnPatchError, match="Sequential: position_ids have gaps, several axes"):
        looks(given, **options)


def test_a_cache_carries_what_was_counted():
    cache = filled(0)
    looks({"mask": LEFT.tolist(), "positions": [[0, 0, 0, 1], [0, 1, 2, 3]]}, cache=cache)
    assert cache.attnpatch_counting == {("tokens", 0)}
    cache = filled(4, {("tokens", 2), ("columns", 2)})
    looks({"positions": [[6, 7, 8, 9]]}, cache=cache)
    assert cache.attnpatch_counting == {("tokens", 2), ("columns", 2)}


# -- which kernel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Kernels of which these are obstructed, and these compute something else."""

    def make(obstacles=(), wrong=()):
        tried = []
        monkeypatch.setattr(choice, "set_kernel", lambda name: name)
        monkeypatch.setattr(choice, "check_blind", lambda model, anatomy, edits: tried.append(("blind", *edits)))
        monkeypatch.setattr(choice, "on_few_layers", lambda model, sites, run: run(()))
        monkeypatch.setattr(choice, "roles_of", lambda model: DECODER)
        monkeypatch.setattr(choice, "default_inputs", lambda model: {"ids": IDS, "mask": LEFT})
        monkeypatch.setattr(choice, "ranked", lambda device: ("fast", "slow", "slower"))
        monkeypatch.setattr(choice, "obstacle", lambda name, request: "is not here." if name in obstacles else None)

        def logits_under(model, edits, given):
            tried.append(("reference", *edits))
            return sorted(given)

        def trial(model, edits, given, wanted, training):
            assert sorted(given) == wanted
            tried.append((*edits, len(given), training))
            return "differs." if edits[1] in wrong else None

        monkeypatch.setattr(choice, "logits_under", logits_under)
        monkeypatch.setattr(choice, "trial", trial)
        return tried

    return make


def pick(backend="auto", training=False):
    request = types.SimpleNamespace(model=types.SimpleNamespace(device=torch.device("cpu")), training=training)
    anatomy = types.SimpleNamespace(architecture="Model", attending=())
    return choice.choose(anatomy, request, backend, ["put in"], "a bias")


def test_the_fastest_kernel_that_gives_the_reference_is_taken(kernels):
    tried = kernels()
    assert pick(training=True) == ("fast", "fast on cpu, equal to the reference on a probe")
    assert tried == [
        ("blind", "put in", "eager"),
        *[("reference", "put in", "eager")] * 2,
        *[("put in", "fast", n, True) for n in (2, 1)],  # with a mask, and without
    ]
    kernels(obstacles=["fast"], wrong=["slow"])
    said = "slower on cpu, equal to the reference on a probe; passed over fast: is not here; slow: differs"
    assert pick() == ("slower", said)


def test_the_dense_way_is_not_tried(kernels):
    tried = kernels()
    assert pick("eager") == ("eager", "dense, with every score in memory")
    assert tried == [("blind", "put in", "eager")]


@pytest.mark.parametrize("how", [{"obstacles": ["slow"]}, {"wrong": ["slow"]}])
def test_a_kernel_that_was_asked_for_and_does_not_do_is_said(how, kernels):
    kernels(**how)
    why = "is not here" if "obstacles" in how else "differs"
    with pytest.raises(AttnPatchError, match=f"Model: no fused kernel adds a bias here: slow: {why}. backend='eager'"):
        pick("slow")


def test_on_few_layers_only_what_ran_may_speak_for_the_whole(kernels, monkeypatch):
    kernels(obstacles=["fast"], wrong=["slow"])
    monkeypatch.setattr(choice, "on_few_layers", lambda model, sites, run: run(("cut",)))
    with pytest.raises(AttnPatchError, match=r"^slow: differs\.$"):
        pick()
    assert choice.BACKENDS[0] == "eager"
