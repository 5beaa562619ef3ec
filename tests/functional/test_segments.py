"""Who sees whom under segment recurrence, token by token, and pieces of a call that lose none of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attnpatch.functional.segments import NOBODY, Segments, pieces

TOKENS = 23
CUTS = [Segments(5, 3), Segments(5, 0), Segments(4, 9), Segments(5, 3, 2), Segments(1, 2, 1), Segments(30, 4, 3)]


def sees(cut, query, key):
    """1901.02860, section 3.2, in numbers: its own segment, and the last tokens before that; 2309.17453 for sinks."""
    begin = query // cut.length * cut.length
    return key <= query and (key >= begin - cut.memory or key < cut.sinks)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_mask_of_a_whole_text(cut):
    wanted = [[sees(cut, q, k) for k in range(TOKENS)] for q in range(TOKENS)]
    assert cut.mask(TOKENS).tolist() == wanted


def test_a_cut_has_no_sinks_unless_it_is_said():
    seen = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]])
    assert torch.equal(Segments(2, 1).mask(5), seen.bool())


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_rows_that_stand_elsewhere_and_places_that_hold_nothing(cut):
    query = torch.tensor([[0, 1, 2], [11, 12, 13], [4, 5, NOBODY]])
    key = torch.tensor([[NOBODY, 0, 1, 2], [3, 11, 12, 13], [0, 3, 4, 5]])
    near = Segments(cut.length, cut.memory)  # sinks are said apart
    found = cut.visible(query, key)
    for row in range(3):
        for i, q in enumerate(query[row].tolist()):
            for j, k in enumerate(key[row].tolist()):
                if q != NOBODY:
                    assert bool(found[row, i, j]) == (k != NOBODY and sees(near, q, k)), (q, k)


@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut.sinks], ids=str)
def test_sinks_are_recalled_where_they_are_not_seen_anyway(cut):
    near, sinks = Segments(cut.length, cut.memory), [*range(cut.sinks), NOBODY]
    query = torch.arange(TOKENS)[None]
    found = cut.recalled(query, torch.tensor([sinks]))[0]
    for q in range(TOKENS):
        wanted = [k != NOBODY and sees(cut, q, k) and not sees(near, q, k) for k in sinks]
        assert found[q].tolist() == wanted


@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut.sinks], ids=str)
def test_sinks_stand_right_before_what_is_seen(cut):
    """Never behind their own place: as long as they are seen in any case, they stay where they are."""
    sinks = torch.arange(cut.sinks)[None]
    for q in range(TOKENS):
        first = min(k for k in range(q + 1) if sees(Segments(cut.length, cut.memory), q, k))
        assert int(cut.oldest(torch.tensor([[q]]))) == first
        found = cut.drawn_near(torch.tensor([[q]]), sinks)[0].tolist()
        assert found == [max(n, first - cut.sinks + n) for n in range(cut.sinks)]


@given(
    length=st.integers(1, 7),
    memory=st.integers(0, 9),
    held=st.integers(0, 9),
    tokens=st.integers(1, 20),
    phase=st.one_of(st.none(), st.integers(0, 6)),
    borders=st.lists(st.integers(0, 25), max_size=3),
)
def test_pieces_cover_a_call_and_hold_all_that_is_seen(length, memory, held, tokens, phase, borders):
    phase = None if phase is None else phase % length
    found = pieces(Segments(length, memory), held, tokens, phase, tuple(borders))
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]
    assert found[-1].stop == tokens
    assert all(piece.start < piece.stop for piece in found)
    assert not {b for b in borders if b < tokens} - {piece.start for piece in found} - {0}
    for piece in found:
        phases = range(length) if phase is None else [(phase + piece.start) % length]
        back = max(phases) + memory
        assert piece.low == max(0, held + piece.start - back)  # no key too few, and none too many
        assert piece.stop - piece.start <= length
        if phase is not None:
            assert (phase + piece.start) // length == (phase + piece.stop - 1) // length  # of one segment


def test_pieces_are_as_long_as_they_may_be():
    found = pieces(Segments(5, 3), 4, 13, 2)
    assert [(p.start, p.stop, p.low) for p in found] == [(0, 3, 0), (3, 8, 4), (8, 13, 9)]
    found = pieces(Segments(5, 3), 4, 13, None)
    assert [(p.start, p.stop, p.low) for p in found] == [(0, 5, 0), (5, 10, 2), (10, 13, 7)]
    found = pieces(Segments(5, 0), 0, 6, 0, borders=(0, 2, 6))
    assert [(p.start, p.stop, p.low) for p in found] == [(0, 2, 0), (2, 5, 0), (5, 6, 5)]
