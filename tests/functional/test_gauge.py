"""Allowed transforms against rotary embeddings in plain loops."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attnpatch.functional.gauge import (
    Frame,
    block_map,
    complex_planes,
    fixed,
    plane_map,
    random_gauge,
    rotary,
    unrotated,
)

LENGTH = 7


def pairs(rotated, interleaved):
    """The dimensions that RoPE turns together, as the two conventions have them."""
    half = rotated // 2
    return [(2 * p, 2 * p + 1) if interleaved else (p, p + half) for p in range(half)]


def rope(x, position, rotated, interleaved, theta=50.0):
    """Turn one vector: a list of numbers, dimension by dimension."""
    out = list(x)
    for p, (a, b) in enumerate(pairs(rotated, interleaved)):
        angle = position * theta ** (-2 * p / rotated)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def scores(queries, keys, rotated, interleaved):
    """Every query at its position with every key at its own; (length, dim) each."""
    turned = [[rope(x, n, rotated, interleaved) for n, x in enumerate(states.tolist())] for states in (queries, keys)]
    return torch.tensor(turned[0], dtype=torch.float64) @ torch.tensor(turned[1], dtype=torch.float64).t()


def states(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LENGTH, dim, generator=generator, dtype=torch.float64)


def moved(frame, seed, spread=0.5):
    """Queries and keys, and both after a random gauge of this frame."""
    queries, keys = states(frame.dim, seed)
    key_map, query_map = random_gauge(frame, torch.Generator().manual_seed(seed + 1), spread)
    return queries, keys, queries @ query_map.t(), keys @ key_map.t()


@settings(max_examples=40)
@given(
    half=st.integers(1, 4),
    rest=st.integers(0, 4),
    interleaved=st.booleans(),
    spread=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_gauge_leaves_rotary_scores(half, rest, interleaved, spread, seed):
    frame = rotary(2 * half + rest, 2 * half, interleaved)
    queries, keys, new_queries, new_keys = moved(frame, seed, spread)
    wanted = scores(queries, keys, 2 * half, interleaved)
    found = scores(new_queries, new_keys, 2 * half, interleaved)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    assert (new_keys - keys).abs().max() > 1e-3, "nothing was changed"


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_gauge_of_unrotated_heads_leaves_plain_scores(spread):
    queries, keys, new_queries, new_keys = moved(unrotated(8), 3, spread)
    torch.testing.assert_close(new_queries @ new_keys.t(), queries @ keys.t())
    assert (new_keys - keys).abs().max() > 0.1


@pytest.mark.parametrize(
    ("frame", "interleaved"),
    [
        (unrotated(8), False),  # free mixing does not commute with a rotation
        (rotary(8, 8, True), False),
        (rotary(8, 8, False), True),
        (rotary(8, 4, False), False),  # too few planes
    ],
)
def test_a_gauge_of_another_kind_does_not(frame, interleaved):
    queries, keys, new_queries, new_keys = moved(frame, 5)
    wanted, found = scores(queries, keys, 8, interleaved), scores(new_queries, new_keys, 8, interleaved)
    assert (found - wanted).abs().max() > 0.05 * wanted.abs().max()


@pytest.mark.parametrize("frame", [unrotated(6), rotary(6, 6, True), rotary(8, 4, False), fixed(5)])
def test_the_two_maps_undo_each_other(frame):
    key, query = random_gauge(frame, torch.Generator().manual_seed(0))
    torch.testing.assert_close(key.t() @ query, torch.eye(frame.dim, dtype=torch.float64))
    key, query = random_gauge(frame, torch.Generator().manual_seed(0), spread=0.0)
    torch.testing.assert_close(key.t() @ key, torch.eye(frame.dim, dtype=torch.float64))
    torch.testing.assert_close(key, query)


def test_fixed_dimensions_stay():
    frame = Frame(torch.tensor([[0, 1]]), torch.tensor([3]), torch.tensor([2]))
    assert frame.dim == 4
    key, query = random_gauge(frame, torch.Generator().manual_seed(0))
    for found in (key, query):
        assert found[2, 2] == 1
        assert found[2].abs().sum() == found[:, 2].abs().sum() == 1
        assert found[3, :3].abs().sum() == found[:3, 3].abs().sum() == 0  # the block of one is only scaled


def test_a_seed_draws_the_same_gauge():
    one, two = (random_gauge(rotary(8, 4, True), torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("frame", [rotary(400, 400, True), unrotated(200)], ids=["planes", "block"])
def test_the_spread_is_that_of_the_factors_logarithms(frame):
    for asked in ((), (1.0,)):
        key, _ = random_gauge(frame, torch.Generator().manual_seed(0), *asked)
        logarithms = torch.linalg.svdvals(key).log()
        assert float(logarithms.std()) == pytest.approx(*asked or (0.5,), rel=0.15)
        assert float(logarithms.mean().abs()) < 0.2


def test_a_frame_is_numbers_wherever_a_model_is_being_built():
    with torch.device("meta"):
        frames = [unrotated(3), fixed(3), rotary(8, 4, True)]
    for frame in frames:
        assert {t.device.type for t in (frame.planes, frame.block, frame.fixed)} == {"cpu"}
        assert frame.planes.shape[1:] == (2,)


def test_the_dimensions_of_a_frame():
    assert rotary(8, 8, False).planes.tolist() == [list(p) for p in pairs(8, False)]
    assert rotary(10, 4, True).planes.tolist() == [[0, 1], [2, 3]]
    assert rotary(10, 4, True).block.tolist() == [4, 5, 6, 7, 8, 9]
    assert rotary(10, 4, False).dim == unrotated(10).dim == fixed(10).dim == 10
    assert unrotated(3).block.tolist() == fixed(3).fixed.tolist() == [0, 1, 2]


@pytest.mark.parametrize("interleaved", [False, True])
def test_planes_are_complex_numbers(interleaved):
    """Moments of z = k[first] + i k[second], and multiplication by a complex number, in Python's own."""
    frame = rotary(6, 4, interleaved)
    keys = torch.randn(11, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = [[[complex(k[h, a], k[h, b]) for h in range(3)] for a, b in pairs(4, interleaved)] for k in keys]
    wanted = [
        [[sum(t[p][i] * t[p][j].conjugate() for t in z) / len(z) for j in range(3)] for i in range(3)] for p in range(2)
    ]
    moments = torch.einsum("tia,tjb->iajb", keys, keys) / len(keys)
    found = complex_planes(moments, frame.planes)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.complex128))

    factors = [cmath.rect(1.7, 0.4), cmath.rect(0.3, -2.0)]
    turned = keys[0, 0] @ plane_map(torch.tensor(factors), frame.planes, 6).to(torch.float64).t()
    for p, (a, b) in enumerate(pairs(4, interleaved)):
        product = factors[p] * z[0][p][0]
        assert complex(turned[a], turned[b]) == pytest.approx(product, rel=1e-6)
    assert turned[4:].tolist() == [0, 0]


def test_a_block_acts_on_its_dimensions_only():
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = block_map(matrix, torch.tensor([3, 1]), 4) @ torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert found.tolist() == [0, 3 * 40 + 4 * 20, 0, 1 * 40 + 2 * 20]
