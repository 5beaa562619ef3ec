"""The packing of heads into rows, proved on the families' own forwards.

Two symmetries of attention that hold for a head's true rows and for no others: permuting whole heads in query, key,
value and output changes nothing; nor does multiplying a head's values and dividing its columns of the output
projection, or multiplying its keys and dividing its queries, by a number of the head's own.
"""

import re

import pytest
import torch
from architectures import FAST, FAST_ENCODERS, causal_lm_types, encoder_types, tiny_model
from tolerances import HEADS_PERMUTED

import hf_attnpatch as ap
from hf_attnpatch import layouts
from hf_attnpatch.layouts import LAYOUTS, weight_rows
from hf_attnpatch.probe import default_inputs, largest_difference, trace

# Families for which one of these is no symmetry, with what stands in its way; that it does is asserted, too.
_SLOPES = "a bias by distance of each head's own"
_NO_PERMUTATION = {
    **dict.fromkeys(["bloom", "mpt", "mpnet", "cpmant", "prophetnet"], _SLOPES),
    "diffllama": "heads work in pairs, and values are shared by the pair",
    "doge": "a mask is computed from the values",
    "convbert": "a convolution over all heads beside the attention",
    "neomme": "what each token adds to the values, head by head",
}
_NO_VALUES = {
    **dict.fromkeys(["gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"], "a value norm"),
    "bitnet": "a norm over all heads before the output projection",
    "diffllama": "a norm over each pair of heads",
    "doge": "a mask is computed from the values",
    "yoso": "what a head gives is normalised",
    "convbert": "heads and a convolution share the output projection",
    "neomme": "what each token adds to the values, head by head",
}
_NO_KEYS = {
    "dbrx": "queries, keys and values are clipped",
    "convbert": "a convolution is computed from the queries",
}
_NOTHING = {"mra": "its attention needs a CUDA kernel; without it, it is zero"}
# what a family keeps for each head beside the projections
_PER_HEAD = re.compile(r"(q|k|query|key|attn_sub)_?(layer_?)?norm|sinks|gate_bias|(gate|g)_proj|conv\.weight")
_NORMED = re.compile(r"(q|k|qk|query|key)_?(layer_?)?norm")
_FAST = [*((t, False) for t in FAST), *((t, True) for t in FAST_ENCODERS)]
_OTHERS = [*((t, False) for t in causal_lm_types()), *((t, True) for t in encoder_types())]


def _families(*excluded, only=()):
    for model_type, encoder in [*_FAST, *(cell for cell in _OTHERS if cell not in _FAST)]:
        if any(model_type in table for table in (*excluded, _NOTHING)) or (only and model_type not in only):
            continue
        marks = () if (model_type, encoder) in _FAST else pytest.mark.full
        yield pytest.param(model_type, encoder, marks=marks, id=model_type + "-masked" * encoder)


def _read(model_type, encoder):
    model = tiny_model(model_type, encoder=encoder)
    anatomy = ap.describe(model)
    sites = [site for site in anatomy.sites if not site.cross and not site.tower]
    if not sites:
        pytest.skip(f"no attention module is read: {dict(anatomy.unread) or dict(anatomy.other)}")
    return model, sites


def _wrong(heads, kv, dim, v_dim):
    """Rows of another packing: heads interleaved, as no family has them."""
    return layouts.Rows(
        *(rows.flatten().view(rows.shape[1], -1).t() for rows in layouts.separate(heads, kv, dim, v_dim))
    )


class Heads:
    """Access to the weights of one site by head, through the packing that is on trial."""

    def __init__(self, model, site, packing=None):
        self.module, self.site = model.get_submodule(site.path), site
        self.output = model.get_submodule(site.output)
        make = packing or site.layout.packing
        self.rows = make(site.num_heads, site.num_kv_heads, site.head_dim, site.v_head_dim)
        wide = weight_rows(self.module.get_submodule(site.layout.query)).shape[0]
        if not site.layout.fused and wide > self.rows.query.numel():  # a gate beside each query head
            self.rows = self.rows._replace(query=torch.arange(wide).view(site.num_heads, -1))

    @property
    def group(self):
        return self.site.num_heads // self.site.num_kv_heads

    def of(self, which):
        """Rows (views into weight and bias are written through them) of ``query``, ``key`` or ``value``."""
        projection = self.module.get_submodule(getattr(self.site.layout, which))
        bias = getattr(projection, "bias", None)
        return getattr(self.rows, which), [weight_rows(projection), *([] if bias is None else [bias])]

    def scale(self, which, factors):
        rows, tensors = self.of(which)
        for tensor in tensors:
            for head, factor in enumerate(factors):
                tensor[rows[head]] *= factor

    def scale_output(self, factors):
        columns = weight_rows(self.output).view(-1, self.site.num_heads, self.site.v_head_dim)
        columns *= torch.tensor(factors)[None, :, None]

    def permute(self, order):
        """Put key-value head ``order[i]`` at place i, its query heads with it, and all that is kept for each head."""
        heads = [g * self.group + j for g in order for j in range(self.group)]
        for which, wanted in (("query", heads), ("key", order), ("value", order)):
            rows, tensors = self.of(which)
            for tensor in tensors:
                tensor[rows.flatten()] = tensor[rows[wanted].flatten()].clone()
        columns = weight_rows(self.output).view(-1, self.site.num_heads, self.site.v_head_dim)
        columns.copy_(columns[:, heads].clone())
        self._permute_the_rest(heads, order)

    def _permute_the_rest(self, heads, order):
        """Norms over all heads, one norm for each head, sinks, gates."""
        taken = [getattr(self.site.layout, w) for w in ("query", "key", "value")]
        for name, parameter in self.module.named_parameters():
            if name.rpartition(".")[0] in taken or not _PER_HEAD.match(name) or _per_head_list(name):
                continue
            for wanted in (heads, order):
                if parameter.shape[0] in (len(wanted), len(wanted) * self.site.head_dim):
                    blocks = parameter.view(len(wanted), -1)
                    blocks.copy_(blocks[wanted].clone())
                    break
        for listed in {
            n.split(".")[0] + "." + n.split(".")[1] for n, _ in self.module.named_parameters() if _per_head_list(n)
        }:
            norms = self.module.get_submodule(listed)
            kept = [norm.weight.clone() for norm in norms]
            for norm, source in zip(norms, heads if len(kept) == len(heads) else order, strict=True):
                norm.weight.copy_(kept[source])


def _per_head_list(name):
    """``q_layernorm.norms.3.weight``: one module for each head."""
    return len(name.split(".")) == 4 and name.split(".")[2].isdigit()


def _change(model, transform):
    inputs = default_inputs(model)
    before = trace(model, inputs).logits
    with torch.no_grad():
        transform()
    return largest_difference(before, trace(model, inputs).logits)


def _rolled(n):
    return [*range(1, n), 0]


def _permute(model, sites):
    for site in sites:
        Heads(model, site).permute(_rolled(site.num_kv_heads))


@pytest.mark.parametrize(("model_type", "encoder"), list(_families(_NO_PERMUTATION)))
def test_permuting_heads_changes_nothing(model_type, encoder):
    model, sites = _read(model_type, encoder)
    assert 0 < _change(model, lambda: _permute(model, sites)) < HEADS_PERMUTED


@pytest.mark.parametrize(("model_type", "encoder"), list(_families(_NO_PERMUTATION)))
def test_a_wrong_packing_does_not_pass_the_permutation(model_type, encoder):
    model, sites = _read(model_type, encoder)

    def permute():
        for site in sites:
            fused = layouts.per_group if site.layout.packing is layouts.blocks else layouts.blocks
            Heads(model, site, fused if site.layout.fused else _wrong).permute(_rolled(site.num_kv_heads))

    assert _change(model, permute) > 1e-2


def _factors(n):
    return [1.0 + 0.5 * i for i in range(n)]


def _spread(site):
    return [1 / f for f in _factors(site.num_kv_heads) for _ in range(site.num_heads // site.num_kv_heads)]


def _scale_values(heads):
    heads.scale("value", _factors(heads.site.num_kv_heads))
    heads.scale_output(_spread(heads.site))


def _scale_keys(heads):
    heads.scale("key", _factors(heads.site.num_kv_heads))
    heads.scale("query", _spread(heads.site))


@pytest.mark.parametrize(("model_type", "encoder"), list(_families(_NO_VALUES)))
def test_values_scale_against_the_output(model_type, encoder):
    """This tells values from keys, and which columns of the output projection belong to a head."""
    model, sites = _read(model_type, encoder)
    change = _change(model, lambda: [_scale_values(Heads(model, site)) for site in sites])
    assert 0 < change < HEADS_PERMUTED


@pytest.mark.parametrize(("model_type", "encoder"), list(_families(_NO_KEYS)))
def test_keys_scale_against_queries(model_type, encoder):
    model, sites = _read(model_type, encoder)
    if any(_NORMED.match(name) for s in sites for name in model.get_submodule(s.path)._modules):
        pytest.skip("it normalises queries and keys: see the test of permutations")
    change = _change(model, lambda: [_scale_keys(Heads(model, site)) for site in sites])
    assert 0 < change < HEADS_PERMUTED


_TRANSFORMS = {
    "permutation": (_NO_PERMUTATION, lambda heads: heads.permute(_rolled(heads.site.num_kv_heads))),
    "values": (_NO_VALUES, _scale_values),
    "keys": (_NO_KEYS, _scale_keys),
}


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        pytest.param(t, what, marks=() if t in FAST else pytest.mark.full)
        for what, (table, _) in _TRANSFORMS.items()
        for t in table
    ],
)
def test_no_exception_is_listed_without_need(model_type, what):
    model, sites = _read(model_type, None)
    transform = _TRANSFORMS[what][1]
    assert _change(model, lambda: [transform(Heads(model, site)) for site in sites]) > 10 * HEADS_PERMUTED


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "codegen", "bloom", "gpt_bigcode"])
def test_keys_are_not_values(model_type):
    model, sites = _read(model_type, False)

    def swapped(*shape, packing):
        rows = packing(*shape)
        return rows._replace(key=rows.value, value=rows.key)

    def scale():
        for site in sites:
            packing = site.layout.packing
            heads = Heads(model, site, lambda *shape, packing=packing: swapped(*shape, packing=packing))
            heads.site.layout.fused or pytest.skip("keys and values are modules of their own")
            _scale_values(heads)

    assert _change(model, scale) > 1e-2


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("packing", [layouts.separate, layouts.blocks, layouts.per_group], ids=lambda p: p.__name__)
def test_rows_are_a_partition(packing, kv):
    rows = packing(4, kv, 3, 5)
    assert [r.shape for r in rows] == [(4, 3), (kv, 3), (kv, 5)]
    if packing is layouts.separate:
        assert all(torch.equal(r.flatten(), torch.arange(r.numel())) for r in rows)
    else:
        assert torch.equal(torch.cat([r.flatten() for r in rows]).sort().values, torch.arange(12 + kv * 8))


def test_codegen_rows_are_a_partition():
    rows = layouts.codegen(8, 8, 3, 3)
    assert torch.equal(torch.cat([r.flatten() for r in rows]).sort().values, torch.arange(72))
    assert rows.query[2, 0] == 18  # the second of four slices begins with the queries of heads 2 and 3
    assert rows.value[2, 0] == 18 + 6
    assert rows.key[2, 0] == 18 + 12


@pytest.mark.full
def test_every_layout_row_is_proved_by_a_family():
    proved = {s.layout.name for t, e in _OTHERS for s in ap.describe(tiny_model(t, encoder=e)).sites}
    assert proved == {row.name for row in LAYOUTS}
