"""What functional/ does on a GPU, on one that is pretended: the CPU's numbers, every tensor where it belongs.

CUDA's flash kernels are stood in for by functions that take what torch's schemas say and compute attention in fp64.
"""

import types

import pytest
import torch
from pretended_gpu import CUDA, PretendedGpu

from hf_attnpatch.functional import alibi, biased, flash, pieces, reference, relative, rotary, spanned, tables, turning
from hf_attnpatch.functional.biased import Distance, Sight
from hf_attnpatch.functional.rerotation import RotaryPlanes
from hf_attnpatch.functional.spans import Bifocal, Chunked, Clipped, Grouped, Sinks

KEEP = torch.ones(2, 12, dtype=torch.bool)
KEEP[1, :4] = False
CAUSAL = reference.causal(12, 12)[None, None]
SLOPES, PLACES = alibi.slopes(4), torch.tensor([[0, 3, 11], [5, 6, 7]])


def states(heads=4, kv=2, queries=12, keys=12, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, width), (2, kv, keys, width), (2, kv, keys, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def on_gpu(function, *args):
    """The results of a function there, back on the CPU; all of them have to have been there."""
    with PretendedGpu():
        moved = [a.to(CUDA) if isinstance(a, torch.Tensor) else a for a in args]
        found = function(*moved)
        for part in found if isinstance(found, tuple) else (found,):
            assert part.device == CUDA
    return found


TURN = RotaryPlanes(rotary.default(100.0, 8))
BIASES = SLOPES[:, None] * KEEP[:, None]
ROW = states()[0][0, 0]


def _relative(query, v, weight, places):
    return relative.bias_rows(query, v, weight, places, 12, 100.0)


def _turned(query):
    return TURN.turn(query, TURN.table(torch.arange(12, device=query.device)))


def _turned_first(query):
    return TURN.turn_first(query, TURN.table(torch.arange(5, device=query.device)))


@torch.no_grad()
def _turned_first_without_gradients(query):
    return _turned_first(query)


PLAIN = {
    "tiled": (lambda t: tables.lengthened(t, 9, "tile"), ROW),
    "interpolated": (lambda t: tables.lengthened(t, 30, "interpolate"), ROW),
    "hierarchical": (lambda t: tables.lengthened(t, 30, "hierarchical"), ROW),
    "sinusoid": (lambda p: turning.sinusoid(p, 6), PLACES),
    "angles": (lambda p: turning.angles(rotary.default(100.0, 8), p), PLACES),
    "columns": (lambda s, p: alibi.columns(s, 0.3, p, 12, torch.bfloat16), SLOPES, PLACES),
    "padded columns": (lambda s, p, k: alibi.columns(s, 0.3, p, 12, torch.float32, k), SLOPES, PLACES, KEEP),
    "offset": (lambda s, p: alibi.offset(s, 0.3, p, 12, torch.bfloat16), SLOPES, PLACES),
    "bias columns": (lambda b, p, k: alibi.bias_columns(b, 0.3, p, torch.float16, k), BIASES, PLACES, KEEP),
    "padding columns": (lambda p, k: alibi.padding_columns(p, torch.float16, k), PLACES, KEEP),
    "relative": (_relative, states(queries=3)[0], states()[0][0, :, 0], torch.ones(4, 8, 6), PLACES),
    "turned": (_turned, states()[0]),
    "turned first": (_turned_first, states()[0]),
    "turned first, without gradients": (_turned_first_without_gradients, states()[0]),
}


@pytest.mark.parametrize("case", PLAIN)
def test_functions_of_positions(case):
    function, *args = PLAIN[case]
    found, wanted = on_gpu(function, *args), function(*args)
    for one, two in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, wanted)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "distance", [Distance(SLOPES), Distance(SLOPES, clip=3), Distance(SLOPES, rounded=torch.bfloat16)]
)
@pytest.mark.parametrize("queries", [12, 1])
@pytest.mark.parametrize(
    "sight",
    [
        Sight(True),
        Sight(True, KEEP),
        Sight(False),
        Sight(False, KEEP),
        Sight(True, mask=CAUSAL & KEEP[:, None, None]),
        Sight(False, mask=torch.zeros(1, 1, 12, 12).masked_fill(~CAUSAL, -1e9)),
    ],
)  # fmt: skip
def test_biased_attention(sight, distance, queries):
    def run(query, key, value, keep, mask):
        rows = None if mask is None else mask[:, :, -queries:]
        return biased.attend(query[:, :, -queries:], key, value, distance, Sight(sight.causal, keep, rows), 0.3)

    args = (*states(), sight.keep, sight.mask)
    seen = 1 if sight.keep is None and sight.mask is None else KEEP[:, None, -queries:, None]
    torch.testing.assert_close(on_gpu(run, *args) * seen, run(*args) * seen, rtol=0, atol=1e-5)


def test_a_mask_and_grouped_heads_never_meet_in_a_kernel(monkeypatch):
    """No kernel of CUDA takes both: a key head is repeated for each of its query heads, next to one another."""
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, enable_gqa=False, **kwargs):
        calls.append((attn_mask is not None, enable_gqa))
        return kernel(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(biased.F, "scaled_dot_product_attention", watched)
    query, key, value = states(kv=2)
    mask = CAUSAL & KEEP[:, None, None]
    bias = SLOPES[None, :, None] * torch.arange(12)

    def run(query, key, value, mask):
        sight = Sight(True, mask=mask)
        return (
            biased.attend(query, key, value, Distance(SLOPES), sight, 0.3),
            biased.attend_with(query, key, value, None, sight, 0.3),
            biased.attend_with(query, key, value, bias.to(query.device), sight, 0.3),
        )

    found = on_gpu(run, query, key, value, mask)
    assert (True, True) not in calls
    assert any(masked for masked, _ in calls)
    matrix = alibi.bias(SLOPES, torch.arange(12), torch.arange(12))
    for out, added in zip(found, (matrix, None, bias[:, :, None]), strict=True):
        wanted, _ = reference.attention(query, key, value, scale=0.3, bias=added, mask=mask)
        real = KEEP[:, None, :, None]
        torch.testing.assert_close((out * real).double(), (wanted * real).nan_to_num(), rtol=0, atol=1e-5)
    calls.clear()
    run(query, key, value, mask)
    assert (True, True) in calls  # the CPU's kernel takes both, and copies nothing


class Kernels:
    """Torch's four operators of CUDA, by their own schemas; each notes that it ran."""

    def __init__(self):
        self.ran = set()

    def __getattr__(self, name):
        schema = getattr(torch.ops.aten, name).default._schema
        names = [a.name for a in schema.arguments]
        needed = {a.name for a in schema.arguments if not a.has_default_value()}

        def kernel(*args, **kwargs):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            assert needed <= set(given) <= set(names)
            self.ran.add(name)
            part = types.SimpleNamespace(**given)
            assert part.query.shape[1] == part.key.shape[1] == part.value.shape[1]  # grouped heads are not taken
            assert all(t.shape[-1] % 8 == 0 for t in (part.query, part.key, part.value))
            assert (part.query.dtype != torch.float32) == ("flash" in name)
            assert part.dropout_p == 0.0
            assert getattr(part, "attn_bias", None) is None
            return (_backward if "backward" in name else _forward)(part, "efficient" in name)

        return kernel


def _scores(part):
    scores = part.scale * part.query.double() @ part.key.double().mT
    if not part.is_causal:
        return scores
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)  # from the top left


def _forward(part, efficient):
    scores = _scores(part)
    out, total = scores.softmax(-1) @ part.value.double(), scores.logsumexp(-1).float()
    if efficient:
        assert part.compute_log_sumexp is True
        total = torch.nn.functional.pad(total, (0, -total.shape[-1] % 32), value=torch.inf)  # CUDA's is so aligned
    else:
        assert part.return_debug_mask is False
    return out.to(part.query.dtype), total, *[None] * (2 if efficient else 7)


def _backward(part, efficient):
    """Flash attention's: dS = P (dP - sum(dO O)) (2205.14135, section 3.1)."""
    grad, out = (getattr(part, "grad_out_", None) if efficient else part.grad_out), part.out.double()
    if efficient:
        assert part.grad_input_mask == [True, True, True, False]
    else:
        assert (part.max_q, part.max_k) == (part.query.shape[2], part.key.shape[2])
    assert grad.is_contiguous()
    assert grad.shape == out.shape == (*part.query.shape[:3], part.value.shape[3])
    assert part.philox_seed.dtype == part.philox_offset.dtype == torch.int64
    assert part.philox_seed.device == part.philox_offset.device == part.query.device
    grad = grad.double()
    rows = (_scores(part) - part.logsumexp[..., None].double()).exp()
    on_scores = rows * (grad @ part.value.double().mT - (grad * out).sum(-1, keepdim=True))
    found = (
        part.scale * on_scores @ part.key.double(),
        part.scale * on_scores.mT @ part.query.double(),
        rows.mT @ grad,
    )
    found = tuple(t.to(part.query.dtype) for t in found)
    return (*found, None) if efficient else found


@pytest.fixture
def kernels(monkeypatch):
    found = Kernels()
    monkeypatch.setattr(flash, "_aten", found)
    monkeypatch.setattr(pieces, "BLOCK", 5)
    monkeypatch.setattr(pieces, "WIDE", 12)
    return found


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("width", [8, 10])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flash_kernels_are_given_what_they_take(kv, width, causal, dtype, kernels):
    args = states(kv=kv, width=width, dtype=dtype)
    out, total = on_gpu(flash.forward, *args, causal, 0.3)
    wanted, log = flash.forward(*args, causal, 0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), wanted.float(), rtol=0, atol=tolerance)
    torch.testing.assert_close(total, log, rtol=0, atol=1e-5)
    grad = torch.randn(2, 12, 4, width, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    found = on_gpu(flash.backward, grad, *args, out, total, causal, 0.3)
    exact = [t.double().requires_grad_() for t in args]
    mask = reference.causal(12, 12) if causal else None
    pulled, _ = reference.attention(*exact, scale=0.3, mask=mask)
    for one, two in zip(found, torch.autograd.grad((pulled * grad.double()).sum(), exact), strict=True):
        assert one.shape == two.shape
        assert (one.double() - two).abs().max() <= tolerance * max(1.0, two.abs().max())
    kind = "efficient" if dtype == torch.float32 else "flash"
    assert kernels.ran == {f"_scaled_dot_product_{kind}_attention{way}" for way in ("", "_backward")}


SPANS = [Grouped(7, 3, 10), Clipped(9, 0.3, 20), Bifocal(4, 11), Chunked(9, 3, 12), Sinks(2, 6)]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_changed_distances(span, padded, kernels):
    args = states(queries=30, keys=30)
    places = torch.stack([torch.arange(30), (torch.arange(30) - 9).clamp(min=-1)])[: 2 if padded else 1]

    def run(query, key, value, places):
        return (
            spanned.attend(query, key, value, places, span, TURN, 0.3),
            spanned.attend(query[:, :, -2:], key, value, places, span, TURN, 0.3),
            spanned.weights(query, key, places, span, TURN, 0.3).exp(),
        )

    for found, wanted in zip(on_gpu(run, *args, places), run(*args, places), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert kernels.ran
