"""What ``apply`` and ``verify`` say where a patched model would decode something else than it computes at once."""

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from transformers import DynamicCache

import hf_attnpatch as ap
from hf_attnpatch import stepwise
from hf_attnpatch.attention import rotation
from hf_attnpatch.positions import added
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
    monkeypatch.setattr(spans.Evicting, "__call__", lambda *_: None)
    patch = ap.AttentionSinks(num_sinks=2, window=6, trained=16)
    _refused(tiny_model("llama"), patch, "the cache would keep every token: 0 of 2 layers let go")


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
