"""Merged flash calls at changed distances against the formula of each paper, written out pair by pair in fp64."""

import bisect

import pytest
import torch

from hf_attnpatch.functional import pieces, reference, rotary, spanned
from hf_attnpatch.functional.rerotation import RotaryPlanes
from hf_attnpatch.functional.spans import Bifocal, Chunked, Clipped, Grouped, Sinks

LENGTH, WIDTH, SCALE = 61, 16, 0.3  # no kernel's default scale
SPANS = [
    Grouped(7, 3, 10),
    Grouped(8, 4, 8),
    Clipped(6, 0.0, 6),
    Clipped(9, 0.3, 20),
    Bifocal(4, 11),
    Chunked(9, 3, 12),
    Chunked(9, 2, 9),
    Chunked(9, 3, 4),
    Sinks(2, 6),
    Sinks(0, 6),
]
each = pytest.mark.parametrize("span", SPANS, ids=str)


def distance(span, i, j):
    """The distance at which query i sees key j, from the papers; None where it does not see it."""
    gap = i - j
    if isinstance(span, Sinks):  # 2309.17453, 3.2: places within the cache of sinks and window
        kept = sorted({*range(min(span.sinks, i + 1)), *range(max(0, i - span.window + 1), i + 1)})
        return kept.index(i) - bisect.bisect_left(kept, j) if j in kept[: span.sinks] or j > i - span.window else None
    if i < span.plain:
        return gap
    if isinstance(span, Grouped):  # 2401.01325, equations 3 and 4
        far = i // span.group + (span.window - span.window // span.group) - j // span.group
        return gap if gap < span.window else far
    if isinstance(span, Clipped):  # Su (2023): w + (i - j - w) / k
        return gap if gap < span.window else span.window + (gap - span.window) * span.leak
    if isinstance(span, Bifocal):  # the authors' code: window (w, 0), floor(p / G), G = ceil(length / trained)
        group = -(-(i + 1) // span.trained)
        return gap if gap <= span.window else i // group - j // group
    place, after = i % span.chunk, i // span.chunk - j // span.chunk  # 2402.17463, 3: intra, successive, inter
    most = span.chunk + span.local
    query = {0: place, 1: min(place + span.chunk, most)}.get(after, most)
    return query - j % span.chunk


def states(heads=4, kv=2, length=LENGTH, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, n, length, WIDTH, dtype=dtype) for n in (heads, kv, kv)]


def turned(turning, *tensors):
    return [turning.turn(t, turning.table(torch.arange(t.shape[2]), t.dtype)) for t in tensors]


def oracle(span, turning, query, key, value):
    pairs = [[distance(span, i, j) if j <= i else None for j in range(key.shape[2])] for i in range(query.shape[2])]
    seen = torch.tensor([[p is not None for p in row] for row in pairs])
    gaps = torch.tensor([[0.0 if p is None else float(p) for p in row] for row in pairs], dtype=torch.float64)
    how = {"interleaved": turning.interleaved, "first": turning.first}
    return reference.rotated(query, key, value, gaps, turning.frequencies, scale=SCALE, mask=seen, **how)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 5)
    monkeypatch.setattr(pieces, "WIDE", 12)


@each
@pytest.mark.parametrize("turning", [(8, False, 0), (8, True, 0), (4, False, 0), (4, True, 8), (4, False, 8)], ids=str)
def test_every_span_equals_its_formula(span, turning, small_blocks):
    planes, interleaved, first = turning
    turning = RotaryPlanes(rotary.default(10000.0, 2 * planes), interleaved, first)
    query, key, value = states()
    wanted = oracle(span, turning, query, key, value)
    near, keys = turned(turning, query, key)
    places = torch.arange(LENGTH)[None]
    found = spanned.attend(near, keys, value, places, span, turning, SCALE)
    chunk = spanned.attend(near[:, :, 40:], keys, value, places, span, turning, SCALE)
    rows = spanned.weights(near, keys, places, span, turning, SCALE).softmax(-1)
    assert (found - wanted).abs().max() < 1e-5
    assert (chunk - wanted[:, :, 40:]).abs().max() < 1e-5
    assert (rows.double() @ value.double().repeat_interleave(2, 1) - wanted).abs().max() < 1e-5
    some = spanned.weights(near[:, :, 40:], keys, places, span, turning, SCALE).softmax(-1)
    assert (some - rows[:, :, 40:]).abs().max() < 1e-6
    for n in (0, 5, 11, 12, 30, 60):
        one = spanned.attend(
            near[:, :, n : n + 1], keys[:, :, : n + 1], value[:, :, : n + 1], places[:, : n + 1], span, turning, SCALE
        )
        assert (one - wanted[:, :, n : n + 1]).abs().max() < 1e-5


BIG = [Grouped(150, 3, 200), Clipped(140, 0.1, 140), Bifocal(130, 300), Chunked(170, 40, 200), Sinks(4, 135)]


@pytest.mark.parametrize("span", BIG, ids=str)
def test_blocks_of_their_usual_size(span, monkeypatch):
    monkeypatch.setattr(pieces, "WIDE", 256)
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))
    query, key, value = states(2, 1, 450)
    wanted = oracle(span, turning, query, key, value)
    found = spanned.attend(*turned(turning, query, key), value, torch.arange(450)[None], span, turning, SCALE)
    assert (found - wanted).abs().max() < 1e-5


@each
def test_a_row_counts_from_its_first_token(span, small_blocks):
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))
    query, key, value = states()
    wanted = oracle(span, turning, query, key, value)
    near, keys = turned(turning, query, key)
    pad = [torch.stack([t[0], torch.nn.functional.pad(t[0], (0, 0, 9, 0))[:, :LENGTH]]) for t in (near, keys, value)]
    places = torch.stack([torch.arange(LENGTH), (torch.arange(LENGTH) - 9).clamp(min=-1)])
    found = spanned.attend(*pad, places, span, turning, SCALE)
    last = spanned.attend(pad[0][:, :, -2:], *pad[1:], places, span, turning, SCALE)
    assert (found[0] - wanted[0]).abs().max() < 1e-5
    assert (found[1, :, 9:] - wanted[0, :, :-9]).abs().max() < 1e-5
    assert (last[1] - wanted[0, :, -11:-9]).abs().max() < 1e-5
    assert not found[1, :, :9].any()


@pytest.mark.parametrize("span", [Grouped(7, 3, 10), Sinks(2, 6)], ids=str)
def test_a_row_of_nothing_but_padding_is_blank(span, small_blocks):
    """As where a batch is read in chunks, and a short row begins in a later one; its values may be of another width."""
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))
    query, key, _ = states()
    value = torch.randn(2, 2, LENGTH, 6)
    near, keys = turned(turning, query, key)
    places = torch.stack([torch.full((LENGTH,), -1), torch.arange(LENGTH)])
    found = spanned.attend(near, keys, value, places, span, turning, SCALE)
    scores = spanned.weights(near, keys, places, span, turning, SCALE)
    assert (found[1] - oracle(span, turning, query, key, value)[1]).abs().max() < 1e-5
    assert found.shape == (2, 4, LENGTH, 6)
    assert not found[0].any()
    assert scores.shape == (2, 4, LENGTH, LENGTH)
    assert torch.isneginf(scores[0]).all()
    for queries in (LENGTH, 2):  # nothing else beside it
        alone = near[:1, :, -queries:], keys[:1], value[:1], places[:1]
        found = spanned.attend(*alone, span, turning, SCALE)
        assert found.shape == (1, 4, queries, 6)
        assert not found.any()
    assert torch.isneginf(spanned.weights(near[:1], keys[:1], places[:1], span, turning, SCALE)).all()


@each
def test_gradients_are_those_of_the_formula(span, small_blocks):
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))
    inputs = [t.requires_grad_() for t in states(length=40, dtype=torch.float64)]
    near, keys = turned(turning, *inputs[:2])
    found = spanned.attend(near, keys, inputs[2], torch.arange(40)[None], span, turning, SCALE)
    weight = torch.randn_like(found)
    got = torch.autograd.grad((found * weight).sum(), inputs)
    wanted = torch.autograd.grad((oracle(span, turning, *inputs) * weight).sum(), inputs)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).abs().max() < 1e-6 * w.abs().max()  # the kernel's log-sum-exp and our tables


@pytest.mark.parametrize("span", [span for span in SPANS if isinstance(span, Sinks)], ids=str)
def test_a_cache_that_let_go_is_read_at_its_places(span, small_blocks):
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))
    query, key, value = states()
    wanted = oracle(span, turning, query, key, value)
    near, keys = turned(turning, query, key)
    for first in (30, 60):  # several queries, and one
        kept = torch.tensor([*range(span.sinks), *range(first - span.window + 1, LENGTH)])
        found = spanned.attend(
            near[:, :, first:], keys[:, :, kept], value[:, :, kept], kept[None], span, turning, SCALE
        )
        assert (found - wanted[:, :, first:]).abs().max() < 1e-5


def test_pieces_are_disjoint_and_complete(small_blocks):
    for span in SPANS:
        count = torch.zeros(LENGTH, LENGTH, dtype=torch.int64)
        for step in (*span.steps(span.plain, LENGTH),):
            for piece in step.pieces:
                (a, b), (c, d) = piece.queries, piece.keys
                part = torch.ones(b - a, d - c, dtype=torch.int64)
                part = {"all": part, "causal": part.tril(), "turned": part.triu()}[piece.sees]
                count[a:b, c:d] += part
        i, j = torch.arange(span.plain, LENGTH)[:, None], torch.arange(LENGTH)
        seen = (j <= i) & (True if span.sees(i, j) is None else span.sees(i, j))
        assert torch.equal(count[span.plain :], seen.long()), span


@each
def test_no_distance_is_beyond_what_the_definition_says(span):
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    found = span.distance(i, j)
    for q in range(LENGTH):
        for k in range(q + 1):
            wanted = distance(span, q, k)
            assert wanted is None or abs(float(found[q, k]) - wanted) < 1e-9


def test_turning_by_far_positions_loses_nothing():
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))
    state = torch.randn(1, 1, 3, WIDTH, dtype=torch.float64)
    far = torch.tensor([10**6, 3 * 10**6 + 1, 7.5])
    there = turning.turn(state, turning.table(far, torch.float64))
    narrow = turning.turn(state.float(), turning.table(far))
    back = turning.turn(there, turning.table(-far, torch.float64))
    assert (back - state).abs().max() < 1e-12
    assert (narrow - there).abs().max() < 1e-5
