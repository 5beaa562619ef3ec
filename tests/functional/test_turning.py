"""Rotations and sinusoids against the papers' formulas written out."""

import math

import pytest
import torch
from pretended_gpu import MPS, PretendedGpu

from hf_attnpatch.functional import rotary
from hf_attnpatch.functional.turning import angles, sinusoid, turned


def _states(length=7, dim=16, dtype=torch.float64):
    return torch.randn(2, 3, length, dim, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 8])
def test_each_pair_is_rotated_by_its_angle(interleaved, width):
    states, places = _states(), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 0, 0, 1, 2]])
    frequencies = rotary.default(100.0, width)
    found = turned(states, *angles(frequencies, places), *([interleaved] if interleaved else []))
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        angle = (places * frequencies[i]).double()[:, None]
        x, y = states[..., a], states[..., b]
        torch.testing.assert_close(found[..., a], x * angle.cos() - y * angle.sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found[..., b], y * angle.cos() + x * angle.sin(), rtol=0, atol=1e-5)
    assert torch.equal(found[..., width:], states[..., width:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(interleaved):
    query, key = _states(), _states().flip(0)
    products = []
    for start in (0, 1000):
        turn = angles(rotary.default(10000.0, 16), torch.arange(start, start + 7)[None])
        products.append(turned(query, *turn, interleaved) @ turned(key, *turn, interleaved).transpose(-1, -2))
    torch.testing.assert_close(*products, rtol=0, atol=1e-3)  # angles are fp32


def test_low_precision_is_rounded_once():
    states = _states(dtype=torch.bfloat16)
    turn = angles(rotary.default(10000.0, 16), torch.arange(5000, 5007)[None])
    exact = turned(states.double(), *turn)
    found = turned(states, *turn)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_angles_are_single_precision_whatever_the_frequencies_are(dtype):
    frequencies = rotary.default(100.0, 8)
    found = angles(frequencies.to(dtype), torch.tensor([[0, 7]]), 1.5)
    wanted = torch.tensor([0.0, 7.0])[:, None] * frequencies.to(dtype).float()
    assert all(torch.equal(a[0, 0], 1.5 * b) for a, b in zip(found, (wanted.cos(), wanted.sin()), strict=True))


def test_the_sinusoid_is_the_papers():
    table = sinusoid(torch.tensor([[0, 1, 65535]]), 6)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], sinusoid(torch.tensor([0, 1, 65535]), 6))
    for place, row in zip((0, 1, 65535), table[0], strict=True):
        for i in range(3):
            angle = torch.tensor(place / 10000 ** (2 * i / 6), dtype=torch.float64)
            assert abs(row[2 * i] - angle.sin()) < 1e-6
            assert abs(row[2 * i + 1] - angle.cos()) < 1e-6


def test_an_odd_width_ends_on_a_sine():
    table = sinusoid(torch.tensor([3]), 5)
    assert table.shape == (1, 5)
    for i in range(5):
        angle = 3 / 10000 ** (2 * (i // 2) / 5)
        assert abs(float(table[0, i]) - (math.cos(angle) if i % 2 else math.sin(angle))) < 1e-6


def test_where_there_is_no_double_precision_single_will_do():
    places = torch.tensor([[0, 1, 500]])
    with PretendedGpu(MPS):
        found = sinusoid(places.to(MPS), 6)
        assert found.device == MPS
    torch.testing.assert_close(found, sinusoid(places, 6), rtol=0, atol=1e-4)
