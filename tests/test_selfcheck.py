"""What ``apply`` and ``verify`` say where a patched model would decode something else than it computes at once."""

import collections
import dataclasses

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from transformers import DynamicCache

import hf_attnpatch as ap
from hf_attnpatch import api, few, stepwise
from hf_attnpatch.attention import rotation
from hf_attnpatch.edits import FirstLayers
from hf_attnpatch.heads import regroup
from hf_attnpatch.modules import added
from hf_attnpatch.probe import largest_difference, trace
from hf_attnpatch.spans import modules as spans
from hf_attnpatch.stepwise import in_pieces
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.caches import length as cached
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE, PASS

IDS = torch.randint(5, 99, (2, 24), generator=torch.Generator().manual_seed(0))
DECODING = ("cached decoding, token by token", "cached decoding, two chunks", "cached decoding after padding")


@pytest.mark.parametrize(
    ("model_type", "patch"),
    [
        ("gpt2", ap.Rotary(theta=500.0)),
        ("opt", ap.Rotary(theta=500.0)),
        ("gpt2", ap.Sinusoidal()),
        ("llama", ap.Sinusoidal()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_decoded_wrong_numbers_on_5_24_is_right(model_type, patch):
    """A renamed argument hid the cache from these: 0.79 to 1.2 of the largest logit, and nobody said so."""
    model = tiny_model(model_type)
    report = ap.apply(model, patch)
    assert "equal the full forward" in report.checks["cached decoding"]
    found = in_pieces(model, {"input_ids": IDS}, [10, 1, 1, 2, 10])
    assert largest_difference(trace(model, {"input_ids": IDS}).logits, found.detach()) < 1e-5
    with torch.no_grad():
        written = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        for _ in range(8):
            ids = written[:, : 24 + _]
            assert torch.equal(model(ids, use_cache=False).logits[:, -1].argmax(-1), written[:, 24 + _])
    assert all(ap.verify(model)[invariant].outcome == PASS for invariant in DECODING)


def test_a_request_that_outgrows_what_it_was_begun_for_is_refused():
    model = tiny_model("llama", max_position_embeddings=16)
    ap.apply(model, ap.RopeScaling(kind="yarn", factor=4.0, per_request=True))
    with pytest.raises(ap.AttnPatchError, match="24 tokens long, in a request for which 10 were chosen"):
        in_pieces(model, {"input_ids": IDS}, [10, 14])


# -- what it costs -----------------------------------------------------------------------------------------------------


def _read(model, patch):
    """Return how many tokens each layer reads while a patch is applied."""
    tokens, layers = collections.Counter(), model.get_decoder().layers

    def note(number):
        return lambda module, args, kwargs: tokens.update(
            {number: (args or [kwargs["hidden_states"]])[0][..., 0].numel()}
        )

    handles = [layer.register_forward_pre_hook(note(n), with_kwargs=True) for n, layer in enumerate(layers)]
    ap.apply(model, patch)
    for handle in handles:
        handle.remove()
    return [tokens[number] for number in range(len(layers))]


@pytest.mark.parametrize(
    "patch",
    [
        ap.GroupedQuery(num_kv_heads=2, method="mean"),
        ap.RopeScaling(kind="yarn", factor=4.0),
        ap.Rotary(theta=500.0),
        ap.Alibi(),
    ],
    ids=lambda patch: patch.name,
)
def test_the_whole_model_reads_two_tokens_and_the_first_layer_of_its_kind_the_rest(patch):
    first, *others = _read(tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4), patch)
    assert others == [2, 2, 2]
    assert first > 60


def test_a_patch_that_must_not_change_the_logits_is_compared_in_all_layers():
    tokens = _read(tiny_model("llama", num_hidden_layers=3, num_key_value_heads=2), ap.GroupedQuery(num_kv_heads=4))
    assert tokens[1:] == [32, 32]


def test_attention_sinks_hold_what_they_promise():
    model = tiny_model("llama")
    ap.apply(model, ap.AttentionSinks(num_sinks=2, window=6, trained=16))
    caches = []
    in_pieces(model, {"input_ids": IDS}, [10, *[1] * 14], caches.append)
    assert [layer.keys.shape[2] for layer in caches[-1].layers] == [7, 7]


# -- the check itself --------------------------------------------------------------------------------------------------


def _refused(model, patch, words_of_it):
    before = snapshot(model)
    with pytest.raises(ap.SelfCheckFailed, match=words_of_it):
        ap.apply(model, patch)
    assert snapshot(model) == before


def test_a_fault_in_the_last_layer_alone_is_found(monkeypatch):
    real = regroup._filled

    def filled(new, tensors, old):
        if old is last:
            tensors = {name: tensor * float("nan") for name, tensor in tensors.items()}
        return real(new, tensors, old)

    model = tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4)
    last = model.model.layers[3].self_attn.v_proj
    monkeypatch.setattr(regroup, "_filled", filled)
    _refused(model, ap.GroupedQuery(num_kv_heads=2, method="mean"), "logits are wrong on the probe: not finite")


def test_a_module_of_the_last_layer_that_no_longer_runs_is_found(monkeypatch):
    real = api.trace

    def trace(model, inputs, watch=()):
        found = real(model, inputs, watch)
        grouped = model.config.num_key_value_heads == 2
        return dataclasses.replace(found, calls={k: n for k, n in found.calls.items() if not (grouped and "3" in k)})

    model = tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4)
    monkeypatch.setattr(api, "trace", trace)
    patch = ap.GroupedQuery(num_kv_heads=2, method="mean")
    _refused(model, patch, "model.layers.3.self_attn: ran 0 times on the probe, 1 before")


def test_numbers_that_were_not_finite_before_are_not_the_patch_s_fault():
    model = tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match="not finite before anything is patched"):
        ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="mean"))
    assert snapshot(model) == before


def test_layers_are_alike_only_if_nothing_but_their_numbers_differs():
    model = tiny_model("llama", num_hidden_layers=3)
    layers, sites = model.model.layers, ap.describe(model).attending
    assert few.one_of_each(model, sites).count == 1
    layers[1].self_attn.window = None
    layers[0].self_attn.window = layers[2].self_attn.window = 4
    assert few.one_of_each(model, sites).count == 2
    layers[2].self_attn.register_forward_hook(lambda *_: None)
    assert few.one_of_each(model, sites) is None  # all three differ
    calls = few.calls_of_all(
        model, FirstLayers("model.layers", 2), {sites[0]: 1, sites[1]: 2, "model.norm": 3}, (*sites, "model.norm")
    )
    assert calls == {sites[0]: 1, sites[1]: 2, "model.norm": 3}


def test_keys_that_miss_their_rotation_on_the_way_into_the_cache_are_found(monkeypatch):
    monkeypatch.setattr(rotation, "view", lambda cache, update: cache)
    _refused(tiny_model("gpt2"), ap.Rotary(theta=500.0), "does not decode what it computes at once")


def test_positions_that_begin_anew_at_each_step_are_found(monkeypatch):
    plain = added.positions

    def anew(given, embeddings):
        if cached(given.get(words.CACHE)):
            return torch.arange(embeddings.shape[1])[None]
        return plain(given, embeddings)

    monkeypatch.setattr(added, "positions", anew)
    _refused(tiny_model("llama"), ap.Sinusoidal(), "does not decode what it computes at once: logits differ by")


def test_a_cache_that_keeps_what_it_should_let_go_is_found(monkeypatch):
    monkeypatch.setattr(spans.EvictHook, "__call__", lambda *_: None)
    patch = ap.AttentionSinks(num_sinks=2, window=6, trained=16)
    kept = "the cache would keep every token: 0 of 2 layers evict those outside the window"
    _refused(tiny_model("llama"), patch, kept)


def test_a_cache_that_is_not_found_is_an_error_and_not_a_question_that_does_not_arise(monkeypatch):
    """Hidden from what looks for it, while ``generate`` uses it."""
    monkeypatch.setattr(stepwise, "resumed", lambda model, output: {})
    model = tiny_model("llama", num_key_value_heads=4)
    _refused(model, ap.GroupedQuery(num_kv_heads=2, method="mean"), "returned none that it takes again")
    found = ap.verify(model, save=False)
    assert {found[invariant].outcome for invariant in DECODING} == {FAIL}
    assert "returned none that it takes again" in found[DECODING[0]].note
    assert not found.passed


def test_a_model_that_reads_its_text_again_for_each_token_has_no_cache():
    model = tiny_model("openai-gpt")
    found = ap.verify(model, save=False)
    assert found[DECODING[0]].outcome == NOT_APPLICABLE
    assert "was seen to read the whole text again" in found[DECODING[0]].note
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="mean"))
    assert "was seen to read the whole text again" in report.checks["cached decoding"]


def test_what_the_model_did_wrong_before_the_patch_is_said_and_not_refused(monkeypatch):
    """A cache that loses a token is the model's own fault here: the patch is applied, and the report says it."""
    plain = DynamicCache.update

    def forgetful(self, key, value, *args, **kwargs):
        keys, values = plain(self, key, value, *args, **kwargs)
        return keys * 0.5, values

    monkeypatch.setattr(DynamicCache, "update", forgetful)
    model = tiny_model("llama")
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="mean"))
    assert "differs from the full forward, as before the patch" in report.checks["cached decoding"]
    assert report.changed
    assert ap.describe(model).sites[0].num_kv_heads == 2
