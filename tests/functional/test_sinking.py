"""Learned sinks through flash kernels against every score written out in fp64, forwards and backwards."""

import pytest
import torch

from hf_attnpatch.functional import sinking
from hf_attnpatch.functional.sinking import Tile

SCALE, LENGTH = 0.3, 37
BELOW = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
BAND = BELOW.triu(-6)[None, None]
KEEP = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
KEEP[1, ..., :9] = False  # so that whole rows of a window are padding


def bands(mask, size=8):
    ends = [(i, min(i + size, LENGTH)) for i in range(0, LENGTH, size)]
    return [Tile((i, j), (max(0, i - 6), j), mask[:, :, i:j, max(0, i - 6) : j]) for i, j in ends]


WAYS = {
    "causal": ([Tile((0, LENGTH), (0, LENGTH), None, True)], BELOW[None, None]),
    "padded": ([Tile((0, LENGTH), (0, LENGTH), KEEP, True)], BELOW & KEEP),
    "both ways": ([Tile((0, LENGTH), (0, LENGTH), KEEP)], KEEP.expand(2, 1, LENGTH, LENGTH)),
    "window": (bands(BAND), BAND),
    "padded window": (bands(BAND & KEEP), BAND & KEEP),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def oracle(query, key, value, sinks, mask):
    """Every score and one more, softmax, and that one left out again."""
    keys, values = (t.repeat_interleave(2, 1) for t in (key, value))
    scores = (SCALE * query @ keys.mT).masked_fill(~mask, -1e30)
    more = (sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks).expand(*scores.shape[:3], 1)
    return torch.cat([scores, more], -1).softmax(-1)[..., :-1] @ values


def states(dtype, width=16, sinks=(4,)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, LENGTH, 16), (2, 2, LENGTH, 16), (2, 2, LENGTH, width), sinks]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("width", "sinks"), [(16, (4,)), (8, (4,)), (16, (2, 4, LENGTH, 1)), (16, (1, 4, 1, 1))])
def test_outputs_and_gradients_are_those_of_one_more_score(dtype, way, width, sinks):
    tiles, mask = WAYS[way]
    mine = states(dtype, width, sinks)
    theirs = [t.detach().double().requires_grad_() for t in mine]
    found, wanted = sinking.attend(*mine, tiles, SCALE), oracle(*theirs, mask)
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found.backward(grad.to(dtype))
    wanted.backward(grad)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() < TOLERANCE[dtype]
    for one, other in zip(mine, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() < TOLERANCE[dtype] * max(1.0, other.grad.abs().max())


def test_a_query_that_sees_nothing_gets_nothing_and_gives_none():
    query, key, value, sinks = states(torch.float32)
    nobody = torch.zeros(1, 1, 1, LENGTH, dtype=torch.bool)
    out = sinking.attend(query, key, value, sinks, [Tile((0, LENGTH), (0, LENGTH), nobody)], SCALE)
    out.sum().backward()
    assert not out.any()
    assert all(not t.grad.any() for t in (query, key, value, sinks))


def test_a_sink_far_below_the_scores_leaves_plain_attention():
    query, key, value, _ = states(torch.float32)
    low = torch.full((4,), -1e4)
    found = sinking.sdpa(query, key, value, low, None, True, SCALE)
    plain = sinking.sdpa(query, key, value, None, None, True, SCALE)
    assert torch.equal(found, plain)


def test_a_mask_that_is_trained_gets_its_gradient():
    query, key, value, sinks = states(torch.float64)
    bias = torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64, requires_grad=True)
    sinking.sdpa(query, key, value, sinks, bias, False, SCALE).square().sum().backward()
    step = 1e-6 * torch.randn(bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = [sinking.sdpa(query, key, value, sinks, (bias + s * step).detach(), False, SCALE) for s in (1, -1)]
    change = (ends[0].square().sum() - ends[1].square().sum()) / 2
    assert torch.allclose((bias.grad * step).sum(), change, rtol=1e-5)
