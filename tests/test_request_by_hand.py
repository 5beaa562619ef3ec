"""Lengths and angles by request, piece by piece: no model, numbers written out by hand."""

import contextvars
import copy
import types

import pytest
import torch
from torch import nn

from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.rope import request_length as lengths
from hf_attnpatch.rope.request_angles import RequestAngles
from hf_attnpatch.rope.request_length import Call, ChooseLengths, Requests
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import Roles

ROTARY = Roles("Rotary", ("x", "places"), {words.STATES: "x", words.POSITIONS: "places"}, {}, False)
NAMES = {
    **{words.TOKENS: "ids", words.EMBEDDINGS: "embeds", words.MASK: "mask"},
    **{words.POSITIONS: "places", words.CACHE: "kept"},
}
DECODER = Roles("Decoder", tuple(NAMES.values()), NAMES, {}, True)


def given(**named):
    return DECODER.bind((), {DECODER.names[role]: value for role, value in named.items()})


# -- angles of each row ------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Angles are positions times the length that it was built for: one tensor, or cosines and sines apart."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x, places):
        found = places[..., None].double() * self.config.length
        return found if self.config.single else (found, -found)


class Growing:
    def __init__(self):
        self.made = []

    def config(self, config, module, length):
        self.made.append(length)
        return types.SimpleNamespace(length=length, single=config.single)


def turned(hook, module, asked, places, rows):
    """What the hook makes of one call, for requests of these lengths; None where the module's own output stays."""
    states = torch.zeros(rows, places.shape[-1], 4)

    def run():
        lengths._FORWARD.set((hook.requests, asked))
        return hook(module, (states,), {"places": places}, module(states, places))

    return contextvars.copy_context().run(run)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("axes", [0, 3])
def test_each_row_is_turned_by_the_module_of_its_length(single, axes):
    module, growing = Rotary(types.SimpleNamespace(length=1, single=single)), Growing()
    hook = RequestAngles(Requests(8), growing, ROTARY)
    places = torch.arange(20).view(4, 5) if not axes else torch.arange(60).view(axes, 4, 5)
    found = turned(hook, module, (12, 5, 8, 12), places, 4)
    by = torch.tensor([12, 1, 1, 12])[:, None, None]  # rows within the window: the module itself
    wanted = places[..., None].double() * by
    assert torch.equal(found if single else found[0], wanted)
    assert single or torch.equal(found[1], -wanted)
    assert growing.made == [12]


def test_one_length_is_one_call_and_the_window_is_none():
    module, growing = Rotary(types.SimpleNamespace(length=1, single=True)), Growing()
    hook = RequestAngles(Requests(8), growing, ROTARY)
    places = torch.arange(5)[None]  # one row of positions for all
    assert turned(hook, module, (8, 3, 1), places, 3) is None
    assert torch.equal(turned(hook, module, (9, 9, 9), places, 3), places[..., None].double() * 9)
    mixed = turned(hook, module, (9, 3, 10), places, 3)
    assert torch.equal(mixed, places[..., None].double() * torch.tensor([9, 1, 10])[:, None, None])
    assert growing.made == [9, 10]  # each is built once


def test_several_versions_of_each_row_have_the_length_of_the_row():
    hook = RequestAngles(Requests(8), Growing(), ROTARY)
    module = Rotary(types.SimpleNamespace(length=1, single=True))
    found = turned(hook, module, (9, 3), torch.ones(4, 1), 4)
    assert found.flatten().tolist() == [9, 9, 1, 1]


def test_modules_of_other_models_and_forwards_are_none_of_ours():
    hook = RequestAngles(Requests(8), Growing(), ROTARY)
    module = Rotary(types.SimpleNamespace(length=1, single=True))
    states, places = torch.zeros(1, 3, 4), torch.arange(3)[None]
    for forward in (None, (Requests(8), (9,))):

        def run(forward=forward):
            lengths._FORWARD.set(forward)
            with pytest.raises(AttnPatchError, match="called outside its model"):
                hook(module, (states,), {"places": places}, None)

        contextvars.copy_context().run(run)


# -- how long a text is ------------------------------------------------------------------------------------------------


def test_a_row_is_as_long_as_its_last_position_says():
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    places = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    assert lengths._lengths(given(tokens=ids, mask=mask, positions=places), 0) == (2, 4)
    assert lengths._lengths(given(tokens=ids, positions=torch.tensor([[5, 6, 7, 8]])), 5) == (9, 9)
    axes = torch.tensor([[[0, 0, 0, 1], [0, 1, 2, 3]], [[0, 0, 0, 6], [0, 1, 2, 2]]])
    assert lengths._lengths(given(tokens=ids, positions=axes), 0) == (7, 4)


def test_a_row_is_as_long_as_its_mask_or_as_what_came_before():
    ids, embeds = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for inputs in ({"tokens": ids}, {"embeddings": embeds}):
        assert lengths._lengths(given(**inputs, mask=mask), 2) == (3, 5)
        assert lengths._lengths(given(**inputs), 2) == (5, 5)
        assert lengths._lengths(given(**inputs, mask=torch.zeros(2, 1, 3, 5)), 2) == (5, 5)  # who sees whom: no count


def test_rows_that_follow_from_one_request():
    assert lengths._spread((5,), 3) == (5, 5, 5)
    assert lengths._spread((5, 7), 4) == (5, 5, 7, 7)  # beams stand next to one another
    assert lengths._spread((5, 5), 3) == (5, 5, 5)
    with pytest.raises(AttnPatchError, match="3 rows in a batch, but lengths of 2 requests"):
        lengths._spread((5, 7), 3)


PACKED = [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("named", "refused"),
    [
        ({"positions": PACKED}, True),
        ({"positions": [[0, 1, 2, 4, 5]]}, True),  # without a mask and a cache a gap is a border, too
        ({"positions": [[0, 1, 2, 3, 4]]}, False),
        ({"positions": [[3]]}, False),
        ({}, False),
        ({"positions": PACKED, "mask": [[1, 1, 1, 1, 1]]}, True),
        ({"positions": [[0, 1, 2, 4, 5]], "mask": [[1, 1, 1, 1, 1]]}, False),
        ({"positions": [[0, 1, 1, 2, 3]], "mask": [[1, 1, 1, 1, 1]]}, True),
        ({"positions": [[0, 0, 0, 1, 2]], "mask": [[0, 0, 1, 1, 1]]}, False),  # padding
        ({"positions": [[0, 1, 2, 0, 0]], "mask": [[1, 1, 1, 0, 0]]}, False),
        ({"positions": [[0, 1, 0, 1]], "mask": [[1, 1, 1, 1, 1, 1]]}, True),  # behind a cache
        ({"positions": [[0, 0, 0, 1]], "mask": [[1, 1, 0, 0, 1, 1]]}, False),
        ({"positions": [PACKED[0]], "mask": [[1, 1, 1]]}, True),  # of another part: it tells nothing
        ({"positions": [[[0, 0, 1, 1, 2]], [[0, 1, 1, 2, 2]]]}, False),  # of two axes one grows
        ({"positions": [[[0, 0, 1, 1, 2]], [[0, 0, 1, 2, 2]]]}, True),
    ],
)
def test_positions_that_begin_anew(named, refused):
    named = {role: torch.tensor(value) for role, value in named.items()}
    if not refused:
        lengths._refuse_packed(nn.Linear(1, 1), given(**named))
        return
    with pytest.raises(AttnPatchError, match="do not count up by one hold several documents in a row"):
        lengths._refuse_packed(nn.Linear(1, 1), given(**named))


def test_a_gap_on_top_of_a_cache_is_a_text_that_leaves_positions_out():
    lengths._refuse_packed(nn.Linear(1, 1), given(positions=torch.tensor([[0, 1, 2, 4, 5]]), cache=object()))


# -- which length counts -----------------------------------------------------------------------------------------------


class Moved:
    """A cache whose rows can be moved."""

    def __init__(self):
        self.rows = []


for _name in words.MOVES:
    setattr(Moved, _name, lambda self, rows, _name=_name: self.rows.append((_name, rows)))


@pytest.mark.parametrize("name", words.MOVES)
def test_lengths_go_with_their_rows(name):
    cache = Moved()
    lengths.remember(cache, (9, 10, 11))
    twin = copy.deepcopy(cache)
    getattr(cache, name)(torch.tensor([2, 0]))
    assert cache.attnpatch_lengths == (11, 9)
    assert cache.rows[0][0] == name
    assert cache.rows[0][1].tolist() == [2, 0]
    getattr(cache, name)(2)
    assert cache.attnpatch_lengths == (11, 11, 9, 9)
    assert twin.attnpatch_lengths == (9, 10, 11)
    assert not twin.rows
    getattr(twin, name)(torch.tensor([1]))
    assert twin.attnpatch_lengths == (10,)
    assert len(cache.rows) == 2


def test_rows_of_one_length_need_no_company():
    cache = Moved()
    lengths.remember(cache, (9, 9))
    assert vars(cache) == {"rows": [], "attnpatch_lengths": (9, 9)}


def in_context(function):
    return contextvars.copy_context().run(function)


def test_what_is_said_counts_over_what_generate_finds_and_the_inner_over_the_outer():
    mine, other = Requests(8), Requests(8)

    def run():
        assert lengths._told(mine) is None
        with lengths.generating(mine):
            assert lengths._told(mine) is None
            lengths.found_by_generate(mine, (20, 30))
            assert lengths._told(mine) == (20, 30)
            assert lengths._told(other) is None
            with lengths._telling(mine, (40,)), lengths._telling(other, (70,)), lengths._telling(mine, (50,)):
                assert lengths._told(mine) == (50,)
                assert lengths._told(other) == (70,)
            assert lengths._told(mine) == (20, 30)
        assert lengths._told(mine) is None

    in_context(run)


def test_one_that_drafts_takes_the_lengths_it_drafts_for():
    mine, helper = Requests(8), Requests(8)

    def run():
        with lengths.generating(mine):
            lengths.found_by_generate(mine, (90,))
            with lengths.generating(helper):
                lengths.found_by_generate(helper, (15,), drafts=True)
                assert lengths._generating(helper) == Call(helper, (90,), True)
                assert lengths._generating(mine) is None  # whose forward is not in progress
                with pytest.raises(AttnPatchError, match="past the model it belongs to"):
                    lengths.found_by_generate(mine, (15,))
            assert lengths._generating(mine) == Call(mine, (90,), False)
        with lengths.generating(helper):
            lengths.found_by_generate(helper, (15,), drafts=True)  # with nobody to draft for
            assert lengths._told(helper) == (15,)

    in_context(run)


@pytest.mark.parametrize(
    ("found", "said", "fits"),
    [((20,), (20,), True), ((21,), (20,), False), ((8,), (3,), True), ((9,), (3,), False), ((9, 20), (9, 19), False)],
)
def test_generate_may_not_lead_beyond_what_was_said(found, said, fits):
    """Up to the trained window, here 8, everything counts as one."""
    mine = Requests(8)

    def run():
        with lengths._telling(mine, said), lengths.generating(mine):
            if fits:
                lengths.found_by_generate(mine, found)
                return
            with pytest.raises(AttnPatchError, match="generate leads to .* tokens, and the requests were said to have"):
                lengths.found_by_generate(mine, found)

    in_context(run)


def chooses(requests, **named):
    """The lengths that a forward of these inputs is given, and the cache that it went on with."""
    hook = ChooseLengths(requests, DECODER)
    assert hook(nn.Linear(1, 1), (), {DECODER.names[role]: value for role, value in named.items()}) is None
    return lengths._FORWARD.get()


def test_a_forward_chooses_what_it_sees_or_what_was_said():
    mine = Requests(8)

    def run():
        ids = torch.zeros(2, 12, dtype=torch.long)
        assert chooses(mine, tokens=ids) == (mine, (12, 12))
        with lengths._telling(mine, (40, 15)):
            assert chooses(mine, tokens=ids) == (mine, (40, 15))
            with pytest.raises(AttnPatchError, match="row 1 is 16 tokens long, in a request for which 15 were chosen"):
                chooses(mine, tokens=torch.zeros(2, 16, dtype=torch.long))
        with lengths._telling(mine, (5,)):
            chooses(mine, tokens=ids[:, :8])  # as long as the window
            with pytest.raises(AttnPatchError, match="row 0 is 9 tokens long"):
                chooses(mine, tokens=ids[:, :9])
        with lengths.generating(mine):  # which drops what it tries beyond its end
            lengths.found_by_generate(mine, (10,))
            assert chooses(mine, tokens=ids[:1]) == (mine, (10,))

    in_context(run)
