"""Attention functions with a bias or position terms, called as transformers calls them, against scores written out."""

import functools

import pytest
import torch
from pretended_gpu import CUDA, PretendedGpu
from torch import nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_attnpatch import AttnPatchError, UnsupportedArchitecture
from hf_attnpatch.attention.alibi import AlibiBias, alibi_of
from hf_attnpatch.attention.call import AttentionCall
from hf_attnpatch.attention.masks import mask_function
from hf_attnpatch.attention.registry import attention_function
from hf_attnpatch.attention.relative import CHILD, Relative, RelativeTerms
from hf_attnpatch.attention.wrapper import HELD
from hf_attnpatch.functional import alibi, reference
from hf_attnpatch.functional import relative as formulas
from hf_attnpatch.upstream.calls import attention_registered

HEADS, WIDTH, KEYS = 4, 8, 9
GENERATOR = torch.Generator().manual_seed(0)
SINKS, BIAS = torch.randn(HEADS, generator=GENERATOR), torch.randn(1, HEADS, 1, KEYS, generator=GENERATOR)
KEEP = torch.ones(2, KEYS, dtype=torch.bool)
KEEP[1, :3] = False
KERNEL = {name: attention_function(name) for name in ("eager", "sdpa")} | {"flex": attention_function("flex_attention")}
flex_mask = mask_function("flex_attention")


def module(kind="alibi", causal=True, **fields):
    """An attention module as a patch leaves it."""
    made = nn.Module()
    made.is_causal, made.num_key_value_groups = causal, 2
    if kind == "alibi":
        given = {"given": None, "clip": None, "exact": True, "strength": 1.0, **fields}
        setattr(made, HELD, (AlibiBias(**given),))
    if kind == "relative":
        terms = RelativeTerms(HEADS, WIDTH, 6, 100.0, torch.zeros(()))
        for parameter in terms.parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        made.add_module(CHILD, terms)
        setattr(made, HELD, (Relative(),))
    return made.eval().requires_grad_(False)


def states(queries=KEYS, kv=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, HEADS, queries, WIDTH), (2, kv, KEYS, WIDTH), (2, kv, KEYS, WIDTH)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def causal(queries):
    return reference.causal(queries, KEYS)[None, None]


def rows(owner, query, key, mask, scale=None, softcap=None, sinks=None, position_bias=None, here=None):
    """Attention rows in fp64; sinks take their share. The queries are the last tokens unless ``here`` says."""
    scale, query = WIDTH**-0.5 if scale is None else scale, query.double()
    keys = key.double().repeat_interleave(HEADS // key.shape[1], 1)
    here = torch.arange(KEYS - query.shape[2], KEYS) if here is None else here
    terms = owner._modules.get(CHILD)
    content = query if terms is None else query + terms.u.double()[:, None]
    scores = content @ keys.mT
    if terms is not None:
        given = terms.v.double(), terms.weight.double()
        far = formulas.encoding(here[:, None] - torch.arange(KEYS), 6, 100.0)  # q, k, size
        scores = scores + torch.einsum("bhqs,qks->bhqk", (query + given[0][:, None]) @ given[1], far)
    scores = scale * scores
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if (held := alibi_of(owner)) is not None:
        slope = alibi.slopes(HEADS) * held.strength
        scores = scores + alibi.bias(slope, here, torch.arange(KEYS), held.clip)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(2, -1, scores.shape[2], 1)], -1)
    return scores.softmax(-1)[..., :KEYS]


def close(found, wanted_rows, value, seen=None, atol=1e-5):
    values = value.double().repeat_interleave(HEADS // value.shape[1], 1)
    wanted = (wanted_rows @ values).transpose(1, 2)
    real = torch.ones(wanted.shape[:2], dtype=torch.bool) if seen is None else seen[:, 0].expand(wanted.shape[:2])
    torch.testing.assert_close(found.double()[real], wanted[real], rtol=0, atol=atol)


def masked(queries):
    return causal(queries) & KEEP[:, None, None]


@pytest.mark.parametrize("kind", ["alibi", "relative", "plain"])
@pytest.mark.parametrize("queries", [KEYS, 3, 1])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize(
    "more", [{}, {"softcap": 0.7}, {"s_aux": SINKS}, {"position_bias": BIAS}, {"softcap": 0.7, "s_aux": SINKS}], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_dense_reference(kind, queries, kv, more, padded):
    owner, (query, key, value) = module(kind), states(queries, kv)
    mask = masked(queries) if padded else causal(queries)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    eager = KERNEL["eager"]
    found, weights = eager(owner, query, key, value, added, scaling=0.3, **more)
    given = {"softcap": more.get("softcap"), "sinks": more.get("s_aux"), "position_bias": more.get("position_bias")}
    wanted, seen = rows(owner, query, key, mask, 0.3, **given), mask.any(-1)
    close(found, wanted, value, seen)
    wanted = torch.where(seen[..., None], wanted, weights.double())  # rows of padding are whatever they are
    torch.testing.assert_close(weights.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["alibi", "relative"])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("attribute", [True, False])
@pytest.mark.parametrize("function", ["eager", "sdpa"])
def test_who_looks_where_without_a_mask(kind, is_causal, attribute, function):
    """What is passed, else what the module says."""
    owner, (query, key, value) = module(kind, causal=attribute), states()
    if function == "eager" and kind == "relative":
        pytest.skip("the dense one is always given a mask there: transformers writes it")
    found, _ = KERNEL[function](owner, query, key, value, None, is_causal=is_causal)
    looks_back = attribute if is_causal is None else is_causal
    close(found, rows(owner, query, key, causal(KEYS) if looks_back else None), value)


def test_a_module_that_says_nothing_looks_back():
    owner = module()
    del owner.is_causal
    asked = functools.partial(AttentionCall, "sdpa", owner, *[torch.zeros(1, 1, 1, 16)] * 3, None)
    assert asked({}).causal is True
    assert asked({"is_causal": False}).causal is False
    assert asked({}).scale == 0.25
    assert asked({"scaling": 3}).scale == 3.0


@pytest.mark.parametrize("kind", ["alibi", "relative", "plain"])
@pytest.mark.parametrize("queries", [KEYS, 6, 1])
@pytest.mark.parametrize("shape", ["keys", "whole", "added"])
def test_torch_s_kernels_with_every_form_of_mask(kind, queries, shape):
    owner, (query, key, value) = module(kind), states(queries)
    if shape == "keys" and queries == 6:
        pytest.skip("padding alone says nothing of a chunk on top of a cache")
    whole = masked(queries)
    mask = {"keys": KEEP[:, None, None], "whole": whole, "added": torch.zeros(whole.shape).masked_fill(~whole, -1e30)}
    sdpa = KERNEL["sdpa"]
    for scaling in (None, 0.3):
        found, weights = sdpa(owner, query, key, value, mask[shape], scaling=scaling)
        assert weights is None
        assert found.is_contiguous()
        close(found, rows(owner, query, key, whole, scaling), value, whole.any(-1))


@pytest.mark.parametrize("kind", ["alibi", "relative", "plain"])
@pytest.mark.parametrize("function", ["sdpa", "eager"])
def test_on_a_gpu_all_of_it_is_there(kind, function):
    """One that is pretended: no tensor of the CPU gets in between."""
    owner, parts, whole = module(kind), states(), masked(KEYS)
    mask = KEEP[:, None, None] if function == "sdpa" else torch.zeros(whole.shape).masked_fill(~whole, -1e30)
    call = KERNEL[function]
    wanted, _ = call(owner, *parts, mask)
    with PretendedGpu():
        for name, parameter in list(owner.named_parameters()):
            owner.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter.to(CUDA)
        found, _ = call(owner, *(t.to(CUDA) for t in (*parts, mask)))
        assert found.device == CUDA
    real = KEEP[:, :, None, None].expand_as(found)
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["alibi", "relative"])
@pytest.mark.parametrize("function", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("clip", [None, 2])
def test_queries_stand_where_the_mask_says_in_a_cache_of_fixed_length(kind, function, clip):
    """Behind them it is empty."""
    owner = module(kind, **({"clip": clip} if kind == "alibi" else {}))
    (query, key, value), here = states(3), torch.tensor([2, 3, 4])
    seen = (torch.arange(KEYS) <= here[:, None])[None, None]
    mask = {"sdpa": seen, "eager": torch.zeros(seen.shape).masked_fill(~seen, -1e30)}.get(function)
    if function == "flex":
        where = {"q_offset": 2, "mask_function": causal_mask_function, "device": "cpu"}
        mask = flex_mask(2, 3, KEYS, **where)
    found, _ = KERNEL[function](owner, query, key, value, mask)
    close(found, rows(owner, query, key, seen, here=here), value)


def test_without_a_bias_and_without_a_mask_everything_is_seen():
    owner, (query, key, value) = module("plain"), states(3)
    found, weights = KERNEL["eager"](owner, query, key, value, None)
    close(found, rows(owner, query, key, None), value)
    assert weights.shape == (2, HEADS, 3, KEYS)


def test_padding_alone_leaves_a_module_that_looks_both_ways_as_it_is():
    owner, (query, key, value) = module("plain", causal=False), states()
    found, _ = KERNEL["sdpa"](owner, query, key, value, KEEP[:, None, None])
    close(found, rows(owner, query, key, KEEP[:, None, None]), value)


@pytest.mark.parametrize("kind", ["alibi", "relative", "plain"])
@pytest.mark.parametrize("queries", [KEYS, 1])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_flex_attention(kind, queries, kv, both, softcap):
    owner, (query, key, value) = module(kind, causal=not both), states(queries, kv)
    function = bidirectional_mask_function if both else causal_mask_function
    mask = flex_mask(
        2, queries, KEYS, q_offset=KEYS - queries, mask_function=function, attention_mask=KEEP, device="cpu"
    )
    assert mask.query_offset == KEYS - queries
    found, _ = KERNEL["flex"](owner, query, key, value, mask, scaling=0.3, softcap=softcap)
    seen = KEEP[:, None, None].expand(-1, -1, queries, -1) if both else masked(queries)
    close(found, rows(owner, query, key, seen, 0.3, softcap), value, seen.any(-1))
    if both:  # without a mask the queries are the last ones
        found, _ = KERNEL["flex"](owner, query, key, value, None, scaling=0.3, softcap=softcap)
        close(found, rows(owner, query, key, None, 0.3, softcap), value)


@pytest.mark.parametrize("both", [False, True])
def test_flex_attention_clips_distances(both):
    owner = module(causal=not both, clip=3, strength=0.5)
    function = bidirectional_mask_function if both else causal_mask_function
    for queries in (KEYS, 4):
        query, key, value = states(queries)
        where = {"q_offset": KEYS - queries, "mask_function": function, "device": "cpu"}
        found, _ = KERNEL["flex"](owner, query, key, value, flex_mask(2, queries, KEYS, **where))
        close(found, rows(owner, query, key, None if both else causal(queries)), value)
        if both:  # without a mask the queries are the last ones
            found, _ = KERNEL["flex"](owner, query, key, value, None)
            close(found, rows(owner, query, key, None), value)


def test_where_queries_stand_among_keys_that_were_cut_off():
    made = flex_mask(1, 2, 6, q_offset=7, kv_offset=3, mask_function=causal_mask_function, device="cpu")
    assert made.query_offset == 4


@pytest.mark.parametrize("kind", ["alibi", "relative"])
@pytest.mark.parametrize(
    ("function", "name", "refused"),
    [
        ("sdpa", "softcap", True),
        ("sdpa", "s_aux", False),
        ("sdpa", "position_bias", True),
        ("sdpa", "cu_seq_lens_q", True),
        ("flex", "s_aux", True),
        ("flex", "position_bias", True),
        ("flex", "dropout", True),
        ("flex", "softcap", False),
    ],
)
def test_what_a_kernel_would_drop_is_refused(kind, function, name, refused):
    owner, parts = module(kind), states()
    call, given = KERNEL[function], torch.ones(HEADS) if name == "s_aux" else 0.5
    mask = None
    if function == "flex":
        mask = flex_mask(2, KEYS, KEYS, mask_function=causal_mask_function, device="cpu")
    nothing = {name: 0.0 if name == "dropout" else None}
    call(owner, *parts, mask, **nothing)
    call(module("plain"), *parts, mask, **nothing)
    if refused:
        with pytest.raises(AttnPatchError, match=f"passes {name} to its attention, which this kernel cannot compute"):
            call(owner, *parts, mask, **{name: given})
    else:
        found, _ = call(owner, *parts, mask, **{name: given})
        if name == "s_aux":
            close(found, rows(owner, *parts[:2], causal(KEYS), sinks=given), parts[2])


@pytest.mark.parametrize("kind", ["alibi", "relative"])
def test_documents_are_read_from_a_mask_where_there_is_one(kind):
    owner, parts = module(kind), states()
    found, _ = KERNEL["sdpa"](owner, *parts, causal(KEYS), cu_seq_lens_q=torch.tensor([0, KEYS]))
    close(found, rows(owner, *parts[:2], causal(KEYS)), parts[2])


def test_a_rounded_bias_is_not_flex_attention_s():
    with pytest.raises(AttnPatchError, match="flex_attention computes the exact bias only; pass exact=True"):
        KERNEL["flex"](module(exact=False), *states(), None)
    with pytest.raises(AttnPatchError, match="passes a mask of its own, which flex_attention does not take"):
        KERNEL["flex"](module("relative"), *states(), causal(KEYS))


@pytest.mark.parametrize("kind", ["alibi", "relative"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_for_training(kind, training):
    owner, parts = module(kind).train(training), states(kv=4)
    mask = torch.zeros(1, 1, KEYS, KEYS).masked_fill(~causal(KEYS), torch.finfo(torch.float32).min)
    plain, _ = KERNEL["eager"](owner, *parts, mask)
    found, weights = KERNEL["eager"](owner, *parts, mask, dropout=0.5)
    assert bool((weights == 0)[causal(KEYS).expand_as(weights)].any()) == training
    assert torch.equal(found, plain) != training


@pytest.mark.parametrize("kind", ["alibi", "relative"])
@pytest.mark.parametrize("function", ["sdpa", "eager"])
def test_half_precision_goes_in_and_comes_out(kind, function):
    owner, parts = module(kind), states(kv=2, dtype=torch.bfloat16)
    mask = causal(KEYS) if function == "sdpa" else torch.zeros(1, 1, KEYS, KEYS).masked_fill(~causal(KEYS), -1e30)
    found, _ = KERNEL[function](owner, *parts, mask)
    assert found.dtype == torch.bfloat16
    close(found, rows(owner, *parts[:2], causal(KEYS)), parts[2], atol=4e-2)


def test_a_tensor_for_each_head_by_an_unknown_keyword_is_refused():
    """A release that renames the sinks' keyword would otherwise lose them from the scores without a word."""
    registered = attention_registered(lambda module, query, key, value, mask, **kwargs: (query, None))
    given = (module(), *states(), None)
    one, four = torch.zeros(HEADS), torch.zeros(2, HEADS, KEYS, 1)
    for name, value in (("renamed", one), ("renamed", four)):
        with pytest.raises(UnsupportedArchitecture, match="passes renamed, .* a tensor for each head"):
            registered(*given, **{name: value})
    for name, value in (("s_aux", one), ("counted", one.long()), ("states", torch.zeros(2, HEADS, 8)), ("mass", None)):
        assert registered(*given, **{name: value})[0] is given[1]


def test_a_mask_may_come_by_its_keyword():
    registered = attention_registered(lambda module, query, key, value, mask, **kwargs: (mask, kwargs))
    assert registered(module(), *states(), attention_mask=KEEP, dropout=0.0) == (KEEP, {"dropout": 0.0})
