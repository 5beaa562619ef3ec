"""Every position scheme from every scheme: against attention written out, cached, padded, reverted, saved, trained."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from position_reference import logits as reference
from position_reference import sinusoid
from snapshot import snapshot
from tolerances import ROUNDING

import hf_attnpatch as ap
from hf_attnpatch.attention.relative import relative_of
from hf_attnpatch.checkpoint import load
from hf_attnpatch.probe import largest_difference

FP32 = ROUNDING[torch.float32]
LENGTH, THETA, ROWS = 24, 500.0, 40
RELATIVE = "relative (Transformer-XL)"


@dataclass(frozen=True)
class Source:
    """A model that knows positions in one way, perhaps made so by an earlier patch."""

    name: str
    model_type: str
    has: str
    before: tuple = ()
    overrides: dict = field(default_factory=dict)

    @property
    def encoder(self):
        return self.model_type in ("bert", "roberta")

    def build(self, patched=True):
        model = tiny_model(self.model_type, encoder=self.encoder, **self.overrides)
        for patch in self.before if patched else ():
            ap.apply(model, patch)
        return model


SOURCES = [
    *(Source(t, t, "table") for t in ("gpt2", "opt", "biogpt", "gpt_neo", "bert", "roberta")),
    Source("xglm", "xglm", "table"),
    *(Source(t, t, "rotary") for t in ("llama", "gpt_neox", "falcon")),
    *(Source(t, t, "rotary by a table") for t in ("gptj", "codegen")),
    *(Source(t, t, "alibi") for t in ("bloom", "mpt")),
    Source("falcon-alibi", "falcon", "rotary + alibi", overrides={"alibi": True}),
    Source("llama-our-alibi", "llama", "alibi", (ap.Alibi(),)),
    Source("gpt2-our-alibi", "gpt2", "alibi", (ap.Alibi(),)),
    Source("bloom-our-alibi", "bloom", "alibi", (ap.Alibi(slopes=(0.5, 0.4, 0.3, 0.2)),)),
    Source("gpt2-our-rotary", "gpt2", "rotary", (ap.Rotary(theta=77.0),)),
    Source("bloom-our-rotary", "bloom", "rotary", (ap.Rotary(theta=77.0),)),
    Source("llama-our-sinusoid", "llama", "sinusoidal", (ap.Sinusoidal(amplitude=0.3),)),
    Source("llama-our-table", "llama", "table", (ap.PositionTable(length=30, init="sinusoidal"),)),
    Source("llama-our-relative", "llama", RELATIVE, (ap.RelativeXl(),)),
    Source("bloom-our-relative", "bloom", RELATIVE, (ap.RelativeXl(size=8),)),
    Source("llama-none", "llama", "none or inside the attention module", (ap.NoPosition(),)),
    Source("gptj-none", "gptj", "none or inside the attention module", (ap.NoPosition(),)),
    Source("bert-none", "bert", "none or inside the attention module", (ap.NoPosition(),)),
]
TARGETS = {
    "rotary": ap.Rotary(theta=THETA),
    "alibi": ap.Alibi(),
    "sinusoidal": ap.Sinusoidal(),
    "none": ap.NoPosition(),
    "table": ap.PositionTable(length=ROWS, init="sinusoidal"),
    "relative": ap.RelativeXl(size=10),
}
FAST = (
    "gpt2",
    "opt",
    "bert",
    "gpt_neo",
    "llama",
    "gptj",
    "bloom",
    "falcon-alibi",
    "llama-our-alibi",
    "gpt2-our-rotary",
    "llama-our-relative",
)
# what cannot be, and why; everything else must
REFUSED = {
    ("llama-our-alibi", "alibi"): "ALiBi already; revert it first",
    ("gpt2-our-alibi", "alibi"): "ALiBi already; revert it first",
    ("bloom-our-alibi", "alibi"): "ALiBi already; revert it first",
    **{(f"{t}-our-relative", "relative"): "has Transformer-XL's terms already" for t in ("llama", "bloom")},
    **{(s.name, "table"): "init is for a new table" for s in SOURCES if s.has == "table" and s.name != "xglm"},
}
NOTHING_TO_DO = {(s.name, "none") for s in SOURCES if s.name.endswith("-none")}


def _cells(skip=()):
    for source in SOURCES:
        for target in TARGETS:
            if (source.name, target) not in skip:
                marks = () if source.name in FAST else pytest.mark.full
                yield pytest.param(source, target, marks=marks, id=f"{source.name}-{target}")


def _logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def _wanted(source, target, ids, terms):
    """The formula, from the weights that the source had before any patch; and Transformer-XL's new parameters."""
    table = sinusoid(torch.arange(ROWS), 64)
    return reference(source.build(patched=False), ids, target, theta=THETA, table=table, terms=terms)


def _stirred(model):
    """Give Transformer-XL's parameters, where there are any, other values than those they begin with."""
    found = {path: relative_of(model.get_submodule(path)) for path in ap.describe(model).relative}
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for terms in found.values() for p in terms.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return {path: (terms.u.detach(), terms.v.detach(), terms.weight.detach()) for path, terms in found.items()}


def _decoded(model, ids, mask=None):
    """Logits by a prefill of ten tokens, five single ones and the rest on the cache."""
    cache, pieces, start = None, [], 0
    for size in (10, 1, 1, 1, 1, 1, ids.shape[1] - 15):
        given = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        with torch.no_grad():
            out = model(input_ids=ids[:, start : start + size], **{CACHE: cache}, use_cache=True, **given)
        cache, start = out[CACHE], start + size
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def _padded(ids, pad=5):
    wide = torch.cat([torch.full((ids.shape[0], pad), 7), ids], 1)
    mask = torch.ones_like(wide)
    mask[:, :pad] = 0
    return wide, mask


@pytest.mark.parametrize(("source", "target"), list(_cells({*REFUSED, *NOTHING_TO_DO})))
def test_from_every_scheme_to_every_scheme(source, target, tmp_path):
    model = source.build()
    assert ap.describe(model).positions == source.has
    ids = tiny_inputs(model, length=LENGTH)["input_ids"]
    before, logits = _state(model), _logits(model, input_ids=ids)
    report = ap.apply(model, TARGETS[target])
    terms = _stirred(model)
    found = _logits(model, input_ids=ids)

    assert largest_difference(_wanted(source, target, ids, terms), found) < FP32
    assert target == "none" or target in ap.describe(model).positions
    wide, mask = _padded(ids)
    assert largest_difference(found, _logits(model, input_ids=wide, attention_mask=mask)[:, 5:]) < FP32
    if not source.encoder:
        assert largest_difference(found, _decoded(model, ids)) < FP32
        assert largest_difference(found, _decoded(model, wide, mask)[:, 5:]) < FP32

    copy.deepcopy(model).save_pretrained(tmp_path)
    kernel = model.config._attn_implementation
    given = {} if kernel.startswith("fused") else {"attn_implementation": kernel}
    again = load(tmp_path, **given).eval()
    assert ap.describe(again).positions == ap.describe(model).positions
    assert torch.equal(_logits(again, input_ids=ids), found)

    twin = copy.deepcopy(model).train()
    twin(input_ids=ids).logits.square().mean().backward()
    assert [n for n, p in twin.named_parameters() if p.requires_grad and not _reached(n, p)] == []
    assert torch.equal(_logits(model, input_ids=ids), found)

    report.revert()
    assert _state(model) == before
    assert torch.equal(_logits(model, input_ids=ids), logits)


def _state(model):
    """All but the names of attention functions that became known to transformers, which stay known."""
    return {name: value for name, value in snapshot(model).items() if name != "registries"}


def _reached(name, parameter):
    """Whether a gradient came; the pooler and the unused first rows of a vocabulary get none."""
    return parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


@pytest.mark.parametrize(("name", "target"), sorted(REFUSED))
def test_what_cannot_be_is_refused_and_changes_nothing(name, target):
    source = next(s for s in SOURCES if s.name == name)
    model = source.build()
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=REFUSED[name, target]):
        ap.apply(model, TARGETS[target])
    assert snapshot(model) == before


@pytest.mark.parametrize("name", sorted(name for name, _ in NOTHING_TO_DO))
def test_taking_out_nothing_changes_nothing(name):
    model = next(s for s in SOURCES if s.name == name).build()
    before = snapshot(model)
    assert not ap.patch_no_position(model).changed
    assert snapshot(model) == before


def test_a_model_that_keeps_no_segment_ids_is_given_none():
    """XLM adds the embedding of token 0 for segment 0: absence of segments is something else there."""
    model = tiny_model("xlm")
    ids = torch.randint(5, 60, (2, 6))
    ap.apply(model, ap.NoPosition())
    seen = {}
    model.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(ids)
    assert seen["position_ids"] is not None
    assert seen.get("token_type_ids") is None


@pytest.mark.parametrize("patch", [ap.Rotary(theta=500.0), ap.Sinusoidal(), ap.NoPosition()], ids=lambda p: p.name)
def test_latent_attention_that_is_not_read_is_counted_all_the_same(patch):
    model = tiny_model("deepseek_v3")
    report = ap.apply(model, patch)
    assert report.checks["sites called"].startswith("2 of 2")


@pytest.mark.parametrize("settings", [{}, {"use_lang_emb": True, "n_langs": 2}], ids=["plain", "languages"])
def test_a_model_that_cuts_ids_but_not_embeddings_by_a_cache_gets_no_sinusoid(settings):
    """XLM fills the cache that ``generate`` passes, hands none back, and is given the whole text again."""
    model = tiny_model("xlm", **settings)
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="embeddings alone.*generate fails with them"):
        ap.apply(model, ap.Sinusoidal())
    with pytest.raises(ap.UnsupportedArchitecture, match="generate fails with them"):
        ap.plan(model, ap.Sinusoidal())
    assert snapshot(model) == before
    ap.apply(model, ap.NoPosition())


def test_a_model_without_any_cache_may_have_a_sinusoid():
    model = tiny_model("flaubert", encoder=True)
    assert "generate was seen to" in ap.apply(model, ap.Sinusoidal()).checks["cached decoding"]
