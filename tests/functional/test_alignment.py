"""Alignment of heads before averaging, against its optimum where that is known, and small turns elsewhere."""

import math

import pytest
import torch

from hf_attnpatch.functional.alignment import aligned
from hf_attnpatch.functional.gauge import Frame, fixed, plane_map, random_gauge, rotary, unrotated

FRAMES = {
    "halves": rotary(6, 6, False),
    "interleaved": rotary(6, 6, True),
    "partial": rotary(8, 4, False),
    "unrotated": unrotated(5),
}


def rows(members, dim, seed=0, width=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(members, dim, width, generator=generator, dtype=torch.float64)


def spread(turned):
    """Squared distance of turned heads from their mean: what averaging loses."""
    return float((turned - turned.mean(0)).square().sum())


def lost(frame, heads):
    return spread(aligned(frame, heads).reader @ heads)


@pytest.mark.parametrize("name", FRAMES)
def test_the_turns_are_orthogonal_and_the_shared_head_is_their_mean(name):
    frame, heads = FRAMES[name], rows(3, FRAMES[name].dim)
    found = aligned(frame, heads)
    eye = torch.eye(frame.dim, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(found.reader @ found.reader.transpose(1, 2), eye)
    torch.testing.assert_close((found.shared @ heads).sum(0), (found.reader @ heads).mean(0))
    assert math.isnan(found.energy)  # of weights alone nothing is known about it


@pytest.mark.parametrize("name", FRAMES)
def test_equal_heads_stay_as_they_are(name):
    heads = rows(1, FRAMES[name].dim).expand(3, -1, -1)
    eye = torch.eye(FRAMES[name].dim, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(aligned(FRAMES[name], heads).reader, eye)


@pytest.mark.parametrize("name", FRAMES)
def test_heads_that_are_nothing_in_some_dimensions_are_still_turned(name):
    """No phase is best there; any will do, but it has to be one."""
    heads = rows(3, FRAMES[name].dim)
    heads[:, list({*range(FRAMES[name].dim)} - {0, 1})] = 0
    found = aligned(FRAMES[name], heads).reader
    eye = torch.eye(FRAMES[name].dim, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(found @ found.transpose(1, 2), eye)


@pytest.mark.parametrize("name", FRAMES)
def test_heads_that_agree_up_to_a_turn_become_one(name):
    frame = FRAMES[name]
    generator = torch.Generator().manual_seed(1)
    turns = torch.stack([random_gauge(frame, generator, spread=0.0)[0] for _ in range(4)])
    heads = turns @ rows(1, frame.dim)
    assert lost(frame, heads) < 1e-20 * float(heads.square().sum())
    assert spread(heads) > 0.3 * float(heads.square().sum())  # as they are they do not agree
    found = aligned(frame, heads)
    shared = (found.shared @ heads).sum(0)
    torch.testing.assert_close(found.reader.transpose(1, 2) @ shared, heads)


@pytest.mark.parametrize("seed", range(5))
def test_two_unrotated_heads_are_as_close_as_procrustes_can_bring_them(seed):
    heads = rows(2, 5, seed)
    nuclear = torch.linalg.matrix_norm(heads[0] @ heads[1].t(), "nuc")  # Schoenemann 1966
    optimum = float(heads.square().sum() - 2 * nuclear) / 2
    assert lost(unrotated(5), heads) == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("name", ["halves", "interleaved"])
@pytest.mark.parametrize("seed", range(3))
def test_two_rotary_heads_are_as_close_as_phases_can_bring_them(name, seed):
    heads, optimum = rows(2, 6, seed), 0.0
    for a, b in FRAMES[name].planes.tolist():
        one, two = torch.complex(heads[0, a], heads[0, b]), torch.complex(heads[1, a], heads[1, b])
        optimum += float(one.abs().square().sum() + two.abs().square().sum() - 2 * (one.conj() * two).sum().abs()) / 2
    assert lost(FRAMES[name], heads) == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_three_rotary_heads_against_a_grid_of_phases(seed):
    """One plane, alike heads with noise: all phases of the second and third head, in steps of three degrees."""
    generator = torch.Generator().manual_seed(seed)
    frame, common = rotary(2, 2, False), rows(1, 2, seed)
    turns = torch.stack([random_gauge(frame, generator, spread=0.0)[0] for _ in range(3)])
    heads = turns @ common + 0.4 * rows(3, 2, seed + 100)
    angles = torch.arange(120, dtype=torch.float64) * math.pi / 60
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.float64), angles, angles)  # only differences count
    turned = plane_map(torch.polar(torch.ones_like(grid), grid)[..., None], frame.planes, 2) @ heads
    best = float((turned - turned.mean(1, keepdim=True)).square().sum((1, 2, 3)).min())
    found = lost(frame, heads)
    assert found <= best * (1 + 1e-9)
    assert found == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("name", FRAMES)
def test_no_small_allowed_turn_brings_four_heads_closer(name):
    frame, heads = FRAMES[name], rows(4, FRAMES[name].dim, 3)
    turned = aligned(frame, heads).reader @ heads
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        phases = 0.02 * torch.randn(4, len(frame.planes), generator=generator, dtype=torch.float64)
        small = plane_map(torch.polar(torch.ones_like(phases), phases), frame.planes, frame.dim)
        size = len(frame.block)
        skew = 0.02 * torch.randn(4, size, size, generator=generator, dtype=torch.float64)
        index = frame.block
        small[:, index[:, None], index] = torch.linalg.matrix_exp(skew - skew.transpose(1, 2))
        assert spread(small @ turned) >= spread(turned) * (1 - 1e-4)  # 30 rounds come that close to the optimum


def test_dimensions_that_allow_nothing_are_averaged_as_they_are():
    heads = rows(3, 4)
    found = aligned(fixed(4), heads)
    torch.testing.assert_close((found.shared @ heads).sum(0), heads.mean(0))
    mixed = Frame(torch.tensor([[0, 1]]), torch.empty(0, dtype=torch.int64), torch.tensor([2, 3]))
    torch.testing.assert_close((aligned(mixed, heads).shared @ heads).sum(0)[2:], heads.mean(0)[2:])


@pytest.mark.parametrize("name", FRAMES)
def test_dead_heads_divide_nothing_by_zero(name):
    heads = rows(3, FRAMES[name].dim)
    heads[1] = 0
    assert aligned(FRAMES[name], heads).shared.isfinite().all()
    assert aligned(FRAMES[name], torch.zeros_like(heads)).shared.isfinite().all()
