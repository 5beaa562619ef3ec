"""ALiBi by columns, rows and two passes against the matrix in fp64; slopes against the families that publish theirs."""

import pytest
import torch
from tolerances import LOOPS
from torch.nn import functional as F  # noqa: N812
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from hf_attnpatch.functional import alibi, biased, reference
from hf_attnpatch.functional.biased import Distance, Sight

FP32 = LOOPS[torch.float32]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 20, 25, 32, 40, 71, 112])
def test_slopes_are_those_of_bloom_and_mpt(heads):
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi.slopes(heads).float(), bloom, rtol=1e-6, atol=0)
    mpt = build_mpt_alibi_tensor(heads, 2)[:, 0]
    torch.testing.assert_close(alibi.slopes(heads).float(), mpt[:, 1] - mpt[:, 0], rtol=1e-6, atol=0)


def test_slopes_of_the_paper():
    assert alibi.slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(
        alibi.slopes(12)[8:], torch.tensor([0.7071, 0.3536, 0.1768, 0.0884]).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [200, 512, 65536, 70000])
def test_positions_are_exact_in_every_dtype(dtype, length):
    positions = torch.arange(length)
    found = sum(digit.to(dtype).double() * weight for digit, weight in alibi.digits(positions, length, dtype))
    assert torch.equal(found, positions.double())


def test_parts_add_up():
    values = alibi.slopes(12)
    for part in alibi.parts(values, 3, 8):
        assert torch.equal(part.to(torch.bfloat16).double(), part)
    assert (sum(alibi.parts(values, 3, 8)) - values).abs().max() < 2.0**-23


def _row_error(heads, length, dtype, biased_rows):
    """Total variation between the attention rows of the last queries by the kernel and in fp64, and their floor.

    The kernel shows its rows for the last keys through values that are unit vectors; the floor is what the same
    kernel makes of the rows of plain attention.
    """
    rows, width = 8, 16 if heads != 12 else 20
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, rows, width, generator=generator).to(dtype)
    key = torch.randn(1, heads, length, width, generator=generator).to(dtype)
    value = torch.zeros(1, heads, length, width, dtype=dtype)
    value[:, :, -width:] = torch.eye(width, dtype=dtype)
    mask = reference.causal(rows, length)[None, None]
    slope, scale = alibi.slopes(heads), width**-0.5
    matrix = alibi.bias(slope, torch.arange(length - rows, length), torch.arange(length))
    if biased_rows:
        found = biased.attend(query, key, value, Distance(slope), Sight(True, mask=mask), scale)
    else:  # the bias as it is in fp32, in the kernel that takes it
        added = matrix.float()[None].masked_fill(~mask, -torch.inf)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    wanted, _ = reference.attention(query, key, value, scale=scale, bias=matrix, mask=mask)
    return (found.double() - wanted).abs().sum(-1).max().item() / 2


@pytest.mark.parametrize("heads", [8, 12, 40])
@pytest.mark.parametrize("length", [512, 4096, 65536])
def test_attention_rows_in_fp32_are_exact_at_any_position(heads, length):
    assert _row_error(heads, length, torch.float32, True) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [8, 12, 40])
@pytest.mark.parametrize("length", [512, 65536])
def test_attention_rows_in_half_precision_round_as_a_bias_in_fp32_does(dtype, heads, length):
    assert _row_error(heads, length, dtype, True) <= 1.01 * _row_error(heads, length, dtype, False)


def _states(heads=6, kv=3, queries=40, keys=40, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, queries, width), (2, kv, keys, width), (2, kv, keys, width)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _wanted(states, mask, slope=None, clip=None, queries=None):
    slope = alibi.slopes(states[0].shape[1]) if slope is None else slope
    here = torch.arange(states[1].shape[2] - states[0].shape[2], states[1].shape[2]) if queries is None else queries
    matrix = alibi.bias(slope, here, torch.arange(states[1].shape[2]), clip)
    return reference.attention(*states, scale=0.3, bias=matrix, mask=mask)[0].float()


def _attend(states, sight, clip=None, **kwargs):
    return biased.attend(*states, Distance(alibi.slopes(states[0].shape[1]), clip), sight, 0.3, **kwargs)


KEEP = torch.ones(2, 40, dtype=torch.bool)
KEEP[1, :9] = False
CAUSAL = reference.causal(40, 40)[None, None]
PADDED = CAUSAL & KEEP[:, None, None]
WINDOW = CAUSAL & ~reference.causal(40, 40).roll(7, 0)[None, None].tril(-7)
DOCUMENTS = CAUSAL & (torch.arange(40)[:, None] // 13 == torch.arange(40) // 13)


@pytest.mark.parametrize("clip", [None, 5])
@pytest.mark.parametrize(
    ("sight", "mask"),
    [
        (Sight(True), CAUSAL),
        (Sight(True, KEEP), PADDED),
        (Sight(True, mask=WINDOW), WINDOW),
        (Sight(True, mask=DOCUMENTS), DOCUMENTS),
        (Sight(True, mask=torch.zeros(1, 1, 40, 40).masked_fill(~DOCUMENTS, -torch.inf)), DOCUMENTS),
        (Sight(False), torch.ones(1, 1, 40, 40, dtype=torch.bool)),
        (Sight(False, KEEP), KEEP[:, None, None]),
        (Sight(False, mask=KEEP[:, None, None].expand(-1, -1, 40, -1)), KEEP[:, None, None]),
    ],
    ids=["causal", "padded", "window", "documents", "added", "both", "both padded", "both masked"],
)
def test_every_sight_equals_the_matrix(sight, mask, clip):
    states = _states()
    seen = mask.expand(2, 1, 40, 40).any(-1)  # rows of padding see nothing
    found, wanted = _attend(states, sight, clip), _wanted(states, mask, clip=clip)
    torch.testing.assert_close(found * seen[..., None], (wanted * seen[..., None]).nan_to_num(), rtol=0, atol=FP32)


@pytest.mark.parametrize("queries", [1, 3, 9])
def test_chunks_and_steps_of_decoding(queries):
    full = _states()
    last = [full[0][:, :, -queries:], *full[1:]]
    mask = PADDED[:, :, -queries:]
    sight = Sight(True, KEEP) if queries == 1 else Sight(True, mask=mask)
    torch.testing.assert_close(_attend(last, sight), _wanted(last, mask), rtol=0, atol=FP32)


def test_a_prefill_into_a_longer_cache_leaves_its_rest_away():
    short, room = _states(), _states(queries=40, keys=64)
    states = [short[0], *(torch.cat([a, b[:, :, 40:]], 2) for a, b in zip(short[1:], room[1:], strict=True))]
    keep = torch.cat([KEEP, torch.zeros(2, 24, dtype=torch.bool)], 1)
    found = _attend(states, Sight(True, keep))
    seen = KEEP[:, None, :, None]
    assert torch.equal(found * seen, _attend(short, Sight(True, KEEP)) * seen)


@pytest.mark.parametrize(
    "sight", [Sight(True, KEEP), Sight(False), Sight(False, KEEP)], ids=["causal", "both", "padded"]
)
def test_gradients_equal_those_of_the_matrix(sight):
    states = [t.double().requires_grad_() for t in _states(heads=4, kv=2)]
    slope, mask = (
        alibi.slopes(4),
        PADDED if sight.causal else (KEEP if sight.keep is not None else KEEP | True)[:, None, None],
    )
    weight = torch.randn(2, 4, 40, 16, dtype=torch.float64) * KEEP[:, None, :, None]
    found = biased.attend(*states, Distance(slope), sight, 0.3)
    matrix = alibi.bias(slope, torch.arange(40), torch.arange(40))
    scores = 0.3 * states[0] @ states[1].repeat_interleave(2, 1).mT + matrix
    wanted = scores.masked_fill(~mask, -1e30).softmax(-1) @ states[2].repeat_interleave(2, 1)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), states),
        torch.autograd.grad((wanted * weight).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_keeps_the_mean(causal):
    states = _states(queries=12, keys=12)
    torch.manual_seed(0)
    draws = torch.stack([_attend(states, Sight(causal), dropout=0.3) for _ in range(600)])
    plain = _attend(states, Sight(causal))
    assert not torch.equal(draws[0], draws[1])
    assert ((draws.mean(0) - plain).abs() < 5 * draws.std(0) / 600**0.5 + 1e-4).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_a_bias_that_was_rounded_is_followed(dtype, scale):
    """The parity mode: slope times position in the model's dtype, as BLOOM has it."""
    states = [t.to(dtype) for t in _states(kv=6, queries=40, keys=40)]
    matrix = (alibi.slopes(6).float()[:, None] * torch.arange(40) * 9).to(dtype)[None]
    found = biased.attend_with(*states, matrix, Sight(True, KEEP), scale)
    wanted, _ = reference.attention(*states, scale=scale, bias=matrix[:, :, None], mask=PADDED)
    seen = KEEP[:, None, :, None]
    tolerance = {torch.float32: FP32, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.float() * seen, (wanted.float() * seen).nan_to_num(), rtol=0, atol=tolerance)
    alone = biased.attend_with(states[0][:, :, -1:], *states[1:], matrix, Sight(True, KEEP), scale)
    torch.testing.assert_close(alone.float(), wanted[:, :, -1:].float(), rtol=0, atol=tolerance)


def test_padding_alone_is_hidden():
    states = _states(kv=6)
    found = biased.attend_with(*states, None, Sight(True, KEEP), 0.3)
    wanted, _ = reference.attention(*states, scale=0.3, mask=PADDED)
    seen = KEEP[:, None, :, None]
    torch.testing.assert_close(found * seen, (wanted.float() * seen).nan_to_num(), rtol=0, atol=FP32)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_no_bias_is_plain_attention_and_one_query_stands_at_the_last_key(queries, padded):
    full = _states()
    states = [full[0][:, :, -queries:], *full[1:]]
    found = biased.attend_with(*states, None, Sight(True, KEEP if padded else None), 0.3)
    mask = (PADDED if padded else CAUSAL)[:, :, -queries:]
    wanted, _ = reference.attention(*states, scale=0.3, mask=mask)
    seen = mask.any(-1, keepdim=True)
    torch.testing.assert_close(found * seen, (wanted.float() * seen).nan_to_num(), rtol=0, atol=FP32)


def test_heads_that_share_keys_as_many_as_there_are_keys():
    states = _states(heads=6, kv=3, queries=1, keys=6)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.testing.assert_close(_attend(states, Sight(True)), _wanted(states, mask), rtol=0, atol=FP32)


def test_the_bias_of_a_query_s_own_place_is_zero():
    """Large ones would cost the precision of small scores beside them."""
    biases = torch.tensor([[[0.0, -300.0, 7.5]], [[1e6, 1e6 + 1, 0.25]]])
    found = biased._centred(biases, torch.tensor([[2, 1], [0, 1]]))
    assert found.dtype == torch.float64
    assert found[:, 0].tolist() == [
        [[-7.5, -307.5, 0.0], [300.0, 0.0, 307.5]],
        [[0.0, 1.0, 0.25 - 1e6], [-1.0, 0.0, -0.75 - 1e6]],
    ]


def test_a_rounded_product_equals_bloom_in_its_own_dtype():
    keep = KEEP.long()
    distance = Distance(alibi.slopes(6), rounded=torch.bfloat16)
    found = biased._products(distance, torch.zeros(2, 6, 40, 1), KEEP)
    assert torch.equal(found.flatten(0, 1)[:, None], build_alibi_tensor(keep, 6, torch.bfloat16))


@pytest.mark.parametrize("distance", ["clipped", "rounded", "both ways"])
@pytest.mark.parametrize("step", [1, 7, 39, 40, 41])
def test_rows_of_a_few_queries_at_a_time_are_those_of_all(distance, step, monkeypatch):
    """Whose masks are cut as they are, with another offset for each row of the batch."""
    states = _states(kv=6)
    sight = {"clipped": Sight(True, KEEP), "rounded": Sight(False, mask=PADDED), "both ways": Sight(False, KEEP)}
    given = Distance(alibi.slopes(6), clip=None if distance == "rounded" else 5)
    if distance == "rounded":
        given = Distance(alibi.slopes(6), rounded=torch.float32)
    whole = biased._rows(*states, given, sight[distance], 0.3, 0.0)
    monkeypatch.setattr(biased, "_CHUNK", step * 6 * 40)
    calls, kernel = [], F.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        calls.append(query.shape[2])
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(biased.F, "scaled_dot_product_attention", watched)
    found = biased._rows(*states, given, sight[distance], 0.3, 0.0)
    assert calls == [min(step, 40 - start) for start in range(0, 40, step)]
    real = KEEP[:, None, :, None]
    torch.testing.assert_close(found * real, whole * real, rtol=0, atol=1e-6)


def test_a_half_precision_mask_hides_by_its_lowest_number():
    lowest = torch.finfo(torch.float16).min
    mask = torch.tensor([0.0, -3.5, lowest / 4, lowest / 2, lowest, -torch.inf], dtype=torch.float16)
    found = biased.hiding(mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor([0.0, -3.5, lowest / 4, *[biased.HIDDEN] * 3]))
    for other in (mask.float(), mask.bfloat16(), mask > 0):
        assert biased.hiding(other) is other


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_stands_at_the_last_key_that_it_sees(kind):
    seen = torch.zeros(2, 1, 3, 6, dtype=torch.bool)
    for row, lasts in enumerate([(2, 3, 5), (0, 1, 4)]):
        for n, last in enumerate(lasts):
            seen[row, 0, n, max(0, last - 1) : last + 1] = True
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, biased.HIDDEN)
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 6, 8)
    assert biased.positions(query, key, Sight(True, mask=mask)).tolist() == [[2, 3, 5], [0, 1, 4]]
    for sight in (Sight(True), Sight(False, mask=mask), Sight(False), Sight(True, torch.ones(2, 6).bool())):
        assert biased.positions(query, key, sight).tolist() == [[3, 4, 5]]  # the queries are the last ones
    keep = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    assert biased.positions(query[:, :, :1], key, Sight(True, keep)).tolist() == [[3], [5]]
    assert biased.positions(query[:, :, :1], key, Sight(False, keep)).tolist() == [[5]]


@pytest.mark.parametrize("queries", [40, 9, 4, 1])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", ["none", "keep", "bool", "float"])
def test_a_bias_of_keys_for_every_mask_and_number_of_queries(queries, batch, form):
    """BLOOM's and MPT's own, longer than there are keys where a cache has room."""
    full = _states(kv=3)
    states = [full[0][:, :, -queries:], *full[1:]]
    bias = (alibi.slopes(6)[:, None] * torch.arange(50)).float()[None].repeat(batch, 1, 1)
    bias = bias + torch.arange(batch)[:, None, None] * torch.linspace(0, 1, 50)
    mask = (PADDED if form != "none" else CAUSAL)[:, :, -queries:]
    sight = {
        "none": Sight(True),
        "keep": Sight(True, KEEP),
        "bool": Sight(True, mask=mask),
        "float": Sight(True, mask=torch.zeros(mask.shape).masked_fill(~mask, biased.HIDDEN)),
    }[form]
    if form in ("none", "keep") and queries not in (1, 40):
        pytest.skip("a chunk on top of a cache is told by a mask")
    found = biased.attend_with(*states, bias, sight, 0.3)
    wanted, _ = reference.attention(*states, scale=0.3, bias=bias[:, :, None, :40], mask=mask)
    seen = mask.any(-1, keepdim=True)
    torch.testing.assert_close(found * seen, (wanted.float() * seen).nan_to_num(), rtol=0, atol=FP32)


def test_positions_among_padding_are_counted_for_a_rounded_bias():
    """BLOOM counts the tokens of a row, and gives padding none."""
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    found = biased._products(
        Distance(torch.tensor([0.5, 0.25]).double(), rounded=torch.float32), torch.zeros(2, 2, 5, 1), keep
    )
    counts = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert torch.equal(found, torch.tensor([0.5, 0.25])[:, None] * counts[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_ways_far_apart_weigh_as_they_should(dtype):
    """Columns of far queries are rounded by whole nats, the same for all keys of a pass, but not for both passes."""
    slope, length = alibi.slopes(12)[8:11], 500  # no powers of two
    states = [t.to(dtype).requires_grad_() for t in _states(heads=3, kv=3, queries=length, keys=length)]
    found = biased.attend(*states, Distance(slope), Sight(False), 0.3)
    exact = [t.detach().double().requires_grad_() for t in states]
    matrix = alibi.bias(slope, torch.arange(length), torch.arange(length))
    wanted, _ = reference.attention(*exact, scale=0.3, bias=matrix)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() < tolerance * wanted.abs().max()
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((found.double() * weight).sum(), states)
    for one, two in zip(got, torch.autograd.grad((wanted * weight).sum(), exact), strict=True):
        assert one.dtype == dtype
        assert (one.double() - two).abs().max() < 2 * tolerance * two.abs().max()


BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 24, torch.float64: 49}  # of slopes, in two or three parts


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("length", [200, 3000])
def test_columns_are_the_bias_to_as_many_bits_as_slopes_have(dtype, length):
    """Multiplied in fp64; up to the constant of each query, which `offset` tells."""
    slope, queries = alibi.slopes(12), torch.tensor([[0, 7, length - 1]])
    left, right = alibi.columns(slope, 0.3, queries, length, dtype)
    assert left.dtype == right.dtype == dtype
    assert left.isfinite().all()
    assert left.shape[-1] == right.shape[-1]
    assert left.shape[-1] % 8 == 0  # which GPU kernels ask for
    assert left.shape[-1] - 8 < sum(bool(left[..., n].any()) for n in range(left.shape[-1]))  # and no more than that
    found = 0.3 * left.double() @ right.double().mT - alibi.offset(slope, 0.3, queries, length, dtype)[..., None]
    wanted = slope[:, None, None] * (torch.arange(length) - queries[0][:, None])
    assert ((found[0] - wanted).abs() <= 2.0 ** -BITS[dtype] * wanted.abs() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_of_any_bias_hold_twenty_four_bits_of_it(dtype):
    biases = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 20
    queries = torch.tensor([[4, 49], [0, 11]])
    left, right = alibi.bias_columns(biases, 0.3, queries, dtype)
    assert left.shape[-1] % 8 == right.shape[-1] % 8 == 0
    found = 0.3 * left.double() @ right.double().mT
    here = biases.double().gather(2, queries[:, None].expand(-1, 3, -1))
    wanted = biases.double()[:, :, None] - here[..., None]
    assert (found - wanted).abs().max() <= 2.0**-23 * biases.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("what", ["columns", "bias_columns", "padding_columns"])
def test_padding_is_hidden_by_numbers_that_the_dtype_has(dtype, what):
    queries, keep = torch.arange(40)[None], KEEP
    left, right = {
        "columns": lambda: alibi.columns(alibi.slopes(6), 0.05, queries, 40, dtype, keep),
        "bias_columns": lambda: alibi.bias_columns(torch.zeros(1, 6, 40), 0.05, queries, dtype, keep),
        "padding_columns": lambda: alibi.padding_columns(queries, dtype, keep),
    }[what]()
    assert left.isfinite().all()
    assert right.isfinite().all()
    scores = 0.05 * left.double() @ right.double().mT
    gap = scores[:, :, :, 9:].amin() - scores[1, :, :, :9].amax()
    assert gap > 1e5  # nats: nothing of a key that is padding is left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_that_the_dtype_holds_are_not_split(dtype):
    exact = {torch.bfloat16: 256, torch.float16: 2048, torch.float32: 2**24}[dtype]
    assert len(alibi.digits(torch.arange(9), exact, dtype)) == 1
    if dtype != torch.float32:
        assert len(alibi.digits(torch.arange(9), exact + 1, dtype)) == 2
