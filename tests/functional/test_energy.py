"""The energy that a group keeps, without its maps: the figure that the maps give."""

import itertools

import pytest
import torch
from test_merging import FRAMES, data, moments

from hf_attnpatch.functional.energy import key_energies, value_energies
from hf_attnpatch.functional.gauge import fixed
from hf_attnpatch.functional.merging import calibrated_keys, calibrated_values

HEADS = 4
GROUPS = [group for size in (1, 2, 3, 4) for group in itertools.combinations(range(HEADS), size)]


@pytest.mark.parametrize("name", [*FRAMES, "fixed"])
def test_keys_keep_what_their_maps_keep(name):
    frame = FRAMES.get(name) or fixed(5)
    keys, means, queries = moments(data(HEADS, frame.dim, 1), data(HEADS, frame.dim, 2))
    energies = key_energies(frame, keys, means, queries)
    found = [energies.share(group) for group in GROUPS]
    for group, share in zip(GROUPS, found, strict=True):
        some = list(group)
        own = calibrated_keys(frame, keys[some][:, :, some], means[some], queries[some]).energy
        assert share == pytest.approx(own, abs=1e-7)
    assert len({round(share, 6) for share in found}) > HEADS, "groups differ"


@pytest.mark.parametrize("name", ["unrotated", "fixed"])
def test_values_keep_what_their_maps_keep(name):
    frame = FRAMES.get(name) or fixed(5)
    values, _, output = moments(data(HEADS, frame.dim, 3), data(HEADS, frame.dim, 4))
    energies = value_energies(frame, values, output)
    for group in GROUPS:
        some = list(group)
        own = calibrated_values(frame, values[some][:, :, some], output[some]).energy
        assert energies.share(group) == pytest.approx(own, abs=1e-7)


def test_heads_of_which_nothing_is_left_keep_everything():
    frame = FRAMES["halves"]
    nothing = torch.zeros(2, 6, 2, 6, dtype=torch.float64)
    zero = torch.zeros(2, 6, 6, dtype=torch.float64)
    assert key_energies(frame, nothing, zero[..., 0], zero).share((0, 1)) == 1.0
