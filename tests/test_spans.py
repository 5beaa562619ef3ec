"""The patches that change distances, on models: short inputs as they were, caches, padding, gradients, refusals."""

import copy

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from snapshot import snapshot
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.attention.registry import attention_function
from hf_attnpatch.functional import reference
from hf_attnpatch.functional.spans import Bifocal, Chunked, Clipped, Grouped, Sinks
from hf_attnpatch.spans.attention import span_of
from hf_attnpatch.spans.modules import SinkLayer

PATCHES = {
    "self_extend": ap.SelfExtend(window=6, group=3, trained=10),
    "dual_chunk": ap.DualChunk(trained=12),
    "re_rope": ap.ReRope(window=5, leak=0.2, trained=10),
    "jet_long": ap.JetLong(window=3, trained=8),
    "attention_sinks": ap.AttentionSinks(num_sinks=2, window=6),
}
LENGTH, PAD, SHORT = 40, 9, 8  # tokens, padding of the second row, what every patch leaves as it is
CLOSE = 1e-5
each = pytest.mark.parametrize("name", PATCHES)
models = pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])


def build(model_type="llama", **overrides):
    return tiny_model(model_type, **({"num_key_value_heads": 2} if model_type == "llama" else {}), **overrides)


def inputs():
    ids = torch.randint(5, 99, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, mask=None, **kwargs):
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits


def apart(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def oracle(model, ids, span):
    """A tiny Llama written out in fp64, every pair of tokens turned by its own distance."""
    model = copy.deepcopy(model).double()
    dim, length = model.config.head_dim, ids.shape[1]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (j <= i) & (True if span.sees(i, j) is None else span.sees(i, j))
    frequencies, hidden = model.model.rotary_emb.inv_freq, model.model.embed_tokens(ids)
    for layer in model.model.layers:
        at, normed = layer.self_attn, layer.input_layernorm(hidden)
        states = [p(normed).unflatten(-1, (-1, dim)).transpose(1, 2) for p in (at.q_proj, at.k_proj, at.v_proj)]
        factor = model.model.rotary_emb.attention_scaling**2
        out = reference.rotated(*states, span.distance(i, j), frequencies, scale=factor * dim**-0.5, mask=seen)
        hidden = hidden + at.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@each
def test_a_llama_equals_the_formula_written_out(name):
    model, (ids, _) = build(), inputs()
    spans = {"self_extend": Grouped(6, 3, 10), "dual_chunk": Chunked(9, 2, 12), "re_rope": Clipped(5, 0.2, 10)}
    spans |= {"jet_long": Bifocal(3, 8), "attention_sinks": Sinks(2, 6)}
    with torch.no_grad():
        wanted = oracle(model, ids, spans[name])
    ap.apply(model, PATCHES[name])
    assert span_of(model.model.layers[0].self_attn).span == spans[name]
    assert apart(logits(model, ids), wanted) < CLOSE


def test_on_top_of_a_yarn_scaling_its_factor_on_cosines_stays():
    model, (ids, _) = build(max_position_embeddings=16), inputs()
    ap.patch_rope_scaling(model, kind="yarn", factor=2)
    assert model.model.rotary_emb.attention_scaling > 1
    stretched = copy.deepcopy(model)
    ap.patch_self_extend(model)
    span = span_of(model.model.layers[0].self_attn).span
    assert span == Grouped(16, 8, 32)  # the scaled length is the one that counts as trained
    with torch.no_grad():
        wanted = oracle(stretched, ids, span)
    assert apart(logits(model, ids), wanted) < CLOSE


@each
@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_short_inputs_are_the_same_bits(name, model_type, dtype):
    model = build(model_type, dtype=dtype)
    ids, mask = (t[:, 33 - SHORT :][:, :SHORT] for t in inputs())
    mask = mask.clone()
    mask[1, :3] = 0
    before = logits(model, ids), logits(model, ids, mask)
    ap.apply(model, PATCHES[name])
    assert torch.equal(logits(model, ids), before[0])
    assert torch.equal(logits(model, ids, mask)[mask.bool()], before[1][mask.bool()])


@each
@models
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_batch_and_cache_change_nothing(name, model_type, kind):
    model, (ids, mask) = build(model_type), inputs()
    ap.apply(model, PATCHES[name])
    full = logits(model, ids, mask)
    assert apart(full[1:, PAD:], logits(model, ids[1:, PAD:])) < CLOSE
    assert apart(full[:1], logits(model, ids[:1])) < CLOSE
    for sizes in ([1] * LENGTH, [12, *[1] * 28], [20, 3, 10, 7]):
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, 64)
        pieces, start = [], 0
        for size in sizes:
            part = {"input_ids": ids[:, start : start + size], "attention_mask": mask[:, : start + size]}
            with torch.no_grad():
                pieces.append(model(**part, **{CACHE: cache}, use_cache=True).logits)
            start += size
        found = torch.cat(pieces, 1)
        assert apart(found[mask.bool()], full[mask.bool()]) < CLOSE, sizes


@each
def test_greedy_generation_equals_forwards_without_a_cache(name):
    model, (ids, mask) = build(), inputs()
    ap.apply(model, PATCHES[name])
    ids, mask = ids[:, :20], mask[:, :20]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids, mask)[:, -1:].argmax(-1)], 1)
        mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(found, ids)


@each
def test_gradients_and_weights_are_those_of_the_dense_way(name):
    model, (ids, mask) = build(), inputs()
    ap.apply(model, PATCHES[name])
    gradients, outs = [], []
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        model.zero_grad()
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        found.square().mean().backward()
        outs.append(found.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert apart(*outs) < CLOSE
    for found, wanted in zip(*gradients, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp_min(1e-3)
    with torch.no_grad():
        weights = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0]
    assert weights.shape == (2, 4, LENGTH, LENGTH)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, LENGTH))
    assert not weights[1, :, :, :PAD].any()


@each
def test_a_checkpoint_says_and_does_the_same(name, tmp_path):
    model, (ids, mask) = build(), inputs()
    report = ap.apply(model, PATCHES[name])
    assert not report.stock
    wanted = logits(model, ids, mask)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids, mask), wanted)
    assert torch.equal(logits(copy.deepcopy(again), ids, mask), wanted)
    report.revert()
    assert torch.equal(logits(model, ids, mask), logits(build(), ids, mask))


def test_sinks_keep_a_cache_of_fixed_size_in_a_long_text():
    model, (ids, mask) = build(), inputs()
    ap.apply(model, PATCHES["attention_sinks"])
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options)[CACHE]
    assert all(isinstance(layer, SinkLayer) for layer in cache.layers)
    assert {layer.keys.shape[2] for layer in cache.layers} == {PAD + 2 + 6 - 1}
    assert cache.get_seq_length() == LENGTH + 59
    with pytest.raises(ap.AttnPatchError, match="has evicted tokens"):
        cache.crop(-1)
    cache.crop(0)
    assert cache.get_seq_length() == LENGTH + 59  # nothing was taken back
    assert {layer.get_mask_sizes(1) for layer in cache.layers} == {(PAD + 2 + 6, PAD + 2)}


def test_beams_are_reordered_in_a_cache_that_lets_go():
    model, (ids, _) = build(), inputs()
    ap.apply(model, PATCHES["attention_sinks"])
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids[:1, :20], **options)
    kept = model.generate(input_ids=ids[:1, :20], **{CACHE: StaticCache(model.config, 64)}, **options)
    assert torch.equal(found, kept)


# -- defaults and refusals --------------------------------------------------------------------------------------------


def test_the_group_is_the_smallest_that_reaches_the_target():
    span = Grouped(128, 5, 256)
    model = build(max_position_embeddings=256)
    ap.patch_self_extend(model, target=700)
    assert span_of(model.model.layers[0].self_attn).span == span
    assert span.distance(torch.tensor(699), torch.tensor(0)) < 256
    assert Grouped(128, 4, 256).distance(torch.tensor(699), torch.tensor(0)) >= 256


def test_other_defaults_come_from_the_trained_length():
    found = {}
    for name, fields in {"dual_chunk": {}, "re_rope": {"target": 1024}, "jet_long": {}, "attention_sinks": {}}.items():
        model = build(max_position_embeddings=256)
        ap.apply(model, ap.from_spec({"patch": name, **fields}))
        found[name] = span_of(model.model.layers[0].self_attn).span
    assert found["dual_chunk"] == Chunked(192, 63, 256)
    assert found["jet_long"] == Bifocal(64, 256)
    assert found["attention_sinks"] == Sinks(4, 252)
    leaky = found["re_rope"]
    assert leaky.window == 128
    assert float(leaky.distance(torch.tensor(1023), torch.tensor(0))) == pytest.approx(255)


WRONG = [
    (ap.SelfExtend, {"window": 1}, "at least 2"),
    (ap.SelfExtend, {"group": 0}, "at least 1"),
    (ap.SelfExtend, {"backend": "flex_attention"}, "does not exist"),
    (ap.ReRope, {"leak": 1.0}, "from 0 to below 1"),
    (ap.AttentionSinks, {"num_sinks": -1}, "at least 0"),
    (ap.JetLong, {"trained": 2.5}, "whole number"),
]


@pytest.mark.parametrize(("kind", "fields", "words"), WRONG, ids=str)
def test_what_is_no_length_is_no_patch(kind, fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        kind(**fields)


UNFIT = [
    (ap.SelfExtend(target=64), "not above the 128 tokens"),
    (ap.SelfExtend(window=129), "above the 128 tokens"),
    (ap.SelfExtend(window=100, group=2, target=512), "larger group or a smaller window"),
    (ap.SelfExtend(window=128), "no group reaches"),
    (ap.ReRope(leak=0.5, target=1024), "take at most"),
    (ap.DualChunk(chunk=100, local=40), "chunk and local together"),
    (ap.AttentionSinks(window=128), "num_sinks and window together"),
]


@pytest.mark.parametrize(("patch", "words"), UNFIT, ids=str)
def test_lengths_that_do_not_fit_the_model_are_refused(patch, words):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.apply(model, patch)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gpt2", "positions here are: table"),
        ("bloom", "positions here are: alibi"),
        ("mistral", "a window of 8 tokens"),
        ("gemma2", "backend='eager' computes it densely"),
        ("cohere2", "no rotation"),
    ],
)
def test_models_without_a_place_for_it_are_refused(model_type, words):
    with pytest.raises(ap.UnsupportedArchitecture, match=words):
        ap.patch_self_extend(tiny_model(model_type), window=6, group=3, trained=10)


def test_angles_that_move_with_the_length_are_refused():
    model = build()
    ap.patch_rope_scaling(model, kind="dynamic", factor=2)
    with pytest.raises(ap.UnsupportedArchitecture, match="depend on the length of the text"):
        ap.patch_re_rope(model)


def test_angles_by_request_are_refused():
    model = build(max_position_embeddings=16)
    ap.patch_rope_scaling(model, kind="yarn", factor=2, per_request=True)
    with pytest.raises(ap.UnsupportedArchitecture, match="for each request and row"):
        ap.patch_re_rope(model)


def test_soft_capped_scores_go_the_dense_way():
    model, (ids, mask) = tiny_model("gemma2"), inputs()
    short = logits(model, ids[:, PAD:][:, :SHORT])
    ap.patch_re_rope(model, window=5, trained=10, backend="eager")
    full = logits(model, ids, mask)
    assert apart(logits(model, ids[:, PAD:][:, :SHORT]), short) < CLOSE
    assert apart(full[1:, PAD:], logits(model, ids[1:, PAD:])) < CLOSE


def test_layers_with_a_window_are_left_alone():
    model = tiny_model("gemma3_text")
    report = ap.apply(model, PATCHES["re_rope"])
    kinds = {
        kind: span_of(layer.self_attn) for kind, layer in zip(model.config.layer_types, model.model.layers, strict=True)
    }
    assert kinds["sliding_attention"] is None
    assert kinds["full_attention"] is not None
    assert "left alone, a window of 8 tokens: 1 layers" in " ".join(str(report).split())


def test_one_at_a_time_and_only_over_rotary_positions():
    model = build()
    ap.apply(model, PATCHES["re_rope"])
    with pytest.raises(ap.UnsupportedArchitecture, match="revert it first"):
        ap.apply(model, PATCHES["self_extend"])
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="rotary states"):
        ap.apply(model, ap.Alibi())
    assert snapshot(model) == before


def test_what_the_mask_cannot_say_is_refused():
    model, (ids, mask) = build(), inputs()
    ap.apply(model, PATCHES["self_extend"])
    holes = mask.clone()
    holes[0, 5:7] = 0
    packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
    four = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for given in ({"attention_mask": holes}, {"position_ids": packed}, {"attention_mask": four}):
        with pytest.raises(ap.AttnPatchError, match=r"between the tokens|one text for each row"):
            model(input_ids=ids[: 1 if "position_ids" in given else 2], use_cache=False, **given)
    with pytest.raises(ap.AttnPatchError, match="does not say which keys are padding"):
        attention_function("flash_attention_2")(
            model.model.layers[0].self_attn, *[torch.zeros(1, 4, 3, 16)] * 3, None, scaling=0.25
        )


def test_right_padding_is_not_seen():
    model, (ids, mask) = build(), inputs()
    ap.apply(model, PATCHES["self_extend"])
    mask = mask.flip(1)
    found = logits(model, ids, mask)
    assert apart(found[1, :-PAD], logits(model, ids[1:, :-PAD])[0]) < CLOSE


@pytest.mark.slow
def test_the_embedded_model_reads_four_times_its_context():
    tokenizer = embedded.load_tokenizer()
    texts = [tokenizer(embedded.heldout(domain)[0])["input_ids"][:2048] for domain in embedded.DOMAINS]
    ids = torch.tensor(texts)

    def nats(model, ids):
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, -513:-1]
            return float(F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, -512:].flatten()))

    plain = embedded.load_model()
    within = sum(nats_of(plain, ids[:, end - 512 : end]) for end in (1792, 2048)) / 2  # 256 to 511 tokens before each
    longer = embedded.load_model()
    ap.patch_self_extend(longer)
    assert nats(longer, ids) < within + 0.05
    assert nats(plain, ids) > within + 0.5


def nats_of(model, ids):
    """Loss of the last half of a window of 512."""
    with torch.no_grad():
        found = model(ids, use_cache=False).logits[:, 255:-1]
    return float(F.cross_entropy(found.flatten(0, 1), ids[:, 256:].flatten()))
