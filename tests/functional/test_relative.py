"""Transformer-XL's scores as further dimensions, against the paper's formula written out distance by distance."""

import math

import pytest
import torch
from tolerances import LOOPS

from hf_attnpatch.attention.relative import RelativeTerms
from hf_attnpatch.functional import reference, relative
from hf_attnpatch.functional.alibi import slopes
from hf_attnpatch.functional.biased import Sight, attend_extended
from hf_attnpatch.functional.sinking import HIDDEN

HEADS, WIDTH, SIZE, THETA = 4, 16, 12, 10000.0
SCALE = 0.3  # no kernel's default


def paper(query, key, value, u, v, weight, mask, theta=THETA):
    """1901.02860, section 3.3: A = q k + q W R + u k + v W R, R the sinusoid, its sines first (as the authors have it).

    The last query stands at the last key; all in fp64.
    """
    query, key, value, u, v, weight = (t.double() for t in (query, key, value, u, v, weight))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    q, k, size = query.shape[2], key.shape[2], weight.shape[-1]
    rows = {}
    for distance in range(-k, k + 1):
        angles = [distance / theta ** (2 * f / size) for f in range(size // 2)]
        row = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
        rows[distance] = torch.einsum("hds,s->hd", weight, row)
    table = torch.stack([torch.stack([rows[k - q + i - j] for j in range(k)]) for i in range(q)])  # q, k, heads, d
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) + torch.einsum("hd,bhkd->bhk", u, key)[:, :, None]
    scores = scores + torch.einsum("bhqd,qkhd->bhqk", query, table) + torch.einsum("hd,qkhd->hqk", v, table)
    weights = (SCALE * scores).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ value


def _case(q, k, kv=HEADS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, HEADS, q, WIDTH), (2, kv, k, WIDTH), (2, kv, k, WIDTH)]
    states = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    terms = RelativeTerms(HEADS, WIDTH, SIZE, THETA, states[0].detach())
    with torch.no_grad():
        for parameter in terms.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return states, terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("q", "k", "kv"), [(37, 37, 4), (37, 37, 1), (9, 41, 2), (3, 20, 2), (1, 33, 4)])
def test_it_is_the_paper_s_attention_and_so_are_its_gradients(q, k, kv, dtype):
    states, terms = _case(q, k, kv, dtype)
    mask = torch.ones(q, k, dtype=torch.bool).tril(k - q)
    sight = Sight(True) if q in (1, k) else Sight(True, mask=mask[None, None])
    found = terms.attend(*states, sight, SCALE, 0.0)
    wanted = paper(*states, *terms.parameters(), mask)
    assert float((found - wanted).abs().max()) < LOOPS[dtype]
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    leaves = [*states, *terms.parameters()]
    got = torch.autograd.grad((found * direction).sum(), leaves)
    for one, two in zip(got, torch.autograd.grad((wanted * direction).sum(), leaves), strict=True):
        assert float((one - two).abs().max()) < LOOPS[dtype] * max(1.0, float(two.abs().max()))


def test_it_looks_both_ways():
    states, terms = _case(21, 21)
    found = terms.attend(*states, Sight(False), SCALE, 0.0)
    wanted = paper(*states, *terms.parameters(), torch.ones(21, 21, dtype=torch.bool))
    assert float((found - wanted).abs().max()) < LOOPS[torch.float32]


@pytest.mark.parametrize("q", [2, 30])
def test_padding_is_hidden(q):
    states, terms = _case(q, q)
    keep = torch.ones(2, q, dtype=torch.bool)
    keep[1, : q // 2] = False
    found = terms.attend(*states, Sight(True, keep), SCALE, 0.0)
    mask = torch.ones(q, q, dtype=torch.bool).tril() & keep[:, None, None]
    mask = mask | torch.eye(q, dtype=torch.bool)  # a row of padding alone is whatever it is
    wanted = paper(*states, *terms.parameters(), mask)
    assert float((found - wanted)[0].abs().max()) < LOOPS[torch.float32]
    assert float((found - wanted)[1, :, q // 2 :].abs().max()) < LOOPS[torch.float32]


def test_places_may_be_any_number():
    """A million tokens further on, the same scores: angles are made in fp64."""
    states, terms = _case(8, 8)
    here = torch.arange(8)[None]
    near = terms.of(states[0], SCALE).columns(here, 8)
    left = relative.query_columns(states[0], terms.v, terms.weight, here + 10**6, THETA)
    sines, cosines = relative.encoding(torch.arange(8) + 10**6, SIZE, THETA).chunk(2, -1)
    far = left @ torch.cat([cosines, sines], -1).float().T
    assert float((near[0] @ near[1].transpose(-1, -2) - far).abs().max()) < LOOPS[torch.float32] * float(
        far.abs().max()
    )


def test_bf16_errs_no_more_than_a_dense_bias_of_that_dtype():
    states, terms = _case(256, 256, dtype=torch.bfloat16)
    mask = torch.ones(256, 256, dtype=torch.bool).tril()
    wanted = paper(*states, *terms.parameters(), mask)
    found = terms.attend(*states, Sight(True), SCALE, 0.0)
    rows = relative.bias_rows(states[0], terms.v, terms.weight, torch.arange(256)[None], 256, THETA)
    bias = (SCALE * rows.to(torch.bfloat16)).masked_fill(~mask, HIDDEN)
    dense = torch.nn.functional.scaled_dot_product_attention(
        terms.of(states[0], SCALE).content, *states[1:], bias, scale=SCALE
    )
    errors = [float((out - wanted).square().mean().sqrt()) for out in (found, dense)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("size", [16, 64])
def test_recency_is_alibi_as_far_as_sinusoids_can_say_it(size):
    terms = RelativeTerms(8, size, size, THETA, torch.zeros(()))
    terms.look_back(size**-0.5, 512)
    silent = torch.zeros(1, 8, 1, size)
    rows = size**-0.5 * relative.bias_rows(silent, terms.v, terms.weight, torch.tensor([[511]]), 512, THETA)
    bias = -slopes(8)[:, None] * torch.arange(511, -1, -1)
    apart = (rows[0, :, 0].double().softmax(-1) - bias.softmax(-1)).abs().sum(-1) / 2  # share of attention elsewhere
    assert float(apart.max()) < {16: 0.15, 64: 0.01}[size]


def test_a_float_mask_and_dropout_pass_through():
    states, terms = _case(12, 12)
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), HIDDEN)
    found = attend_extended(
        terms.of(states[0], SCALE).content, *states[1:], terms.of(states[0], SCALE), Sight(True, mask=mask), SCALE
    )
    assert torch.allclose(found, terms.attend(*states, Sight(True), SCALE, 0.0), atol=LOOPS[torch.float32])
    torch.manual_seed(0)
    dropped = terms.attend(*states, Sight(True), SCALE, 0.5)
    assert not torch.allclose(found, dropped, atol=1e-2)


def test_with_zeros_there_are_no_positions():
    states, terms = _case(20, 20)
    with torch.no_grad():
        for parameter in terms.parameters():
            parameter.zero_()
    found = terms.attend(*states, Sight(True), SCALE, 0.0)
    wanted, _ = reference.attention(*states, scale=SCALE, mask=torch.ones(20, 20, dtype=torch.bool).tril())
    assert float((found - wanted).abs().max()) < LOOPS[torch.float32]


def test_recency_is_the_least_squares_that_it_says():
    """Weights 1 / (1 + distance), a bias no lower than -deepest, any constant, and a small ridge."""
    slope, reach, size, scale, deepest = slopes(4), 50, 6, 0.3, 5.0
    distances = torch.arange(reach, dtype=torch.float64)
    share = 1 / (1 + distances)
    root = (share / share.sum()).sqrt()[:, None]
    known = torch.cat([relative.encoding(distances, size, 100.0), torch.ones(reach, 1, dtype=torch.float64)], 1)
    ridge = torch.eye(size + 1, dtype=torch.float64)[:size] * 1e-2  # none on the constant
    wanted = torch.stack([torch.tensor([-min(float(s) * d, deepest) / scale for d in range(reach)]) for s in slope], 1)
    rows = torch.cat([root * known, ridge]), torch.cat([root * wanted, torch.zeros(size, 4)]).double()
    found = relative.recency(slope, scale, size, 100.0, reach, deepest)
    torch.testing.assert_close(found, torch.linalg.lstsq(*rows).solution[:size].T, rtol=0, atol=1e-5)
