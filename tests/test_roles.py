"""What forwards call their arguments is found by running them: names that no release has used work, too."""

import functools
import inspect

import pytest
import torch
from architectures import tiny_model
from transformers import DynamicCache, LlamaForCausalLM, MptForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.mpt import modeling_mpt

import hf_attnpatch as ap
from hf_attnpatch.probe import default_inputs, largest_difference, trace
from hf_attnpatch.stepwise import in_pieces
from hf_attnpatch.upstream import caches, calls, roles, words
from hf_attnpatch.upstream.roles import learn, roles_of

NOW = next(
    name for name in words.ARGUMENTS[words.CACHE] if name in inspect.signature(LlamaForCausalLM.forward).parameters
)


def _renamed(forward, old, new):
    """A forward that declares one of its arguments under another name, and knows the old one no more."""
    inner = inspect.unwrap(forward)
    declared = inspect.signature(forward)

    @functools.wraps(inner)
    def renamed(self, *args, **kwargs):
        if old in kwargs:
            raise TypeError(f"forward() got an unexpected keyword argument '{old}'")
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return forward(self, *args, **kwargs)

    parameters = [p.replace(name=new) if p.name == old else p for p in declared.parameters.values()]
    renamed.__signature__ = declared.replace(parameters=parameters)
    return renamed


@pytest.fixture
def strange_llama(monkeypatch):
    """Llama's decoder layers, model and head, which call their cache ``kv_store``: no release does."""
    monkeypatch.setattr(roles, "_FOUND", {})
    monkeypatch.setattr(roles, "_RUN", set())
    inside = (modeling_llama.LlamaModel, modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaAttention)
    for kind in inside:
        monkeypatch.setattr(kind, "forward", _renamed(kind.forward, NOW, "kv_store"))
    for kind in inside:  # callers inside transformers still say the old name: it is translated on the way in
        monkeypatch.setattr(kind, "__call__", _translating(kind.__call__, NOW, "kv_store"))
    monkeypatch.setattr(LlamaForCausalLM, "forward", _renamed(LlamaForCausalLM.forward, NOW, "kv_store"))
    return tiny_model("llama", num_key_value_heads=2)


def _translating(call, old, new):
    @functools.wraps(call)
    def translated(self, *args, **kwargs):
        if old in kwargs:
            kwargs[new] = kwargs.pop(old)
        return call(self, *args, **kwargs)

    return translated


def test_a_cache_of_a_name_that_no_release_has_is_found(strange_llama):
    learn(strange_llama)
    for path in ("", "model", "model.layers.0", "model.layers.0.self_attn"):
        assert roles_of(strange_llama.get_submodule(path)).name(words.CACHE) == "kv_store"


def test_what_asks_for_a_cache_is_found_inside_too(monkeypatch):
    """By default MPT keeps no cache: a memory that missed the argument of the decoder would keep one nevertheless."""
    monkeypatch.setattr(roles, "_FOUND", {})
    monkeypatch.setattr(roles, "_RUN", set())
    asks = words.ARGUMENTS[words.USE_CACHE][0]
    for kind in (modeling_mpt.MptModel, MptForCausalLM):
        monkeypatch.setattr(kind, "forward", _renamed(kind.forward, asks, "keep_states"))
    monkeypatch.setattr(
        modeling_mpt.MptModel, "__call__", _translating(modeling_mpt.MptModel.__call__, asks, "keep_states")
    )
    model = tiny_model("mpt")
    learn(model)
    assert roles_of(model).name(words.USE_CACHE) == "keep_states"
    assert roles_of(model.transformer).name(words.USE_CACHE) == "keep_states"
    ap.apply(model, ap.SegmentRecurrence(segment_length=8, memory_length=6))
    ids = {"input_ids": torch.arange(3, 11)[None]}
    assert model(**ids, keep_states=False).get(NOW) is None
    assert model(**ids, keep_states=True).get(NOW) is not None


@pytest.mark.parametrize(
    "patch",
    [ap.Rotary(theta=500.0), ap.Sinusoidal(), ap.Alibi(), ap.AttentionSinks(num_sinks=2, window=6)]
    + [ap.SegmentRecurrence(segment_length=8, memory_length=6), ap.SelfExtend(window=6, group=3, trained=10)],
    ids=lambda patch: patch.name,
)
def test_patches_decode_right_under_it(strange_llama, patch):
    report = ap.apply(strange_llama, patch)
    assert "equal the full forward" in report.checks["cached decoding"]
    inputs = default_inputs(strange_llama)
    ids = {name: t[:1] for name, t in inputs.items() if name == "input_ids"}
    found = in_pieces(strange_llama, ids, [3, 1, 1, 2, 3])
    assert largest_difference(trace(strange_llama, ids).logits, found) < 1e-5


def test_roles_are_found_without_a_look_at_the_weights(monkeypatch):
    monkeypatch.setattr(roles, "_FOUND", {})
    monkeypatch.setattr(roles, "_RUN", set())
    model = tiny_model("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ran = []
    handles = [module.register_forward_pre_hook(lambda m, _: ran.append(m)) for module in model.modules()]
    learn(model)
    for handle in handles:
        handle.remove()
    assert not ran  # a twin without data ran in its place
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    attention = roles_of(model.transformer.h[0].attn)
    assert attention.takes(words.STATES, words.CACHE)


def test_an_old_spelling_of_the_caller_reaches_the_hooks():
    """Transformers takes the names of older releases for a while, inside the forward: after hooks have looked."""
    model = tiny_model("gpt2")
    ap.apply(model, ap.Rotary(theta=500.0))
    base = roles_of(model.transformer)
    other = next(name for name in words.ARGUMENTS[words.CACHE] if name not in base.parameters)
    cache = DynamicCache()
    assert base.bind((), {other: cache}).get(words.CACHE) is cache


def test_a_role_that_is_not_there_is_named():
    with pytest.raises(ap.UpstreamChanged, match=r"no argument for cache in the forward of Linear \(it takes input\)"):
        roles_of(torch.nn.Linear(1, 1)).name(words.CACHE)


# -- caches and attention functions ------------------------------------------------------------------------------------


def test_methods_of_a_cache_are_found_by_what_they_do(monkeypatch):
    class Other(DynamicCache):
        def append(self, *args, **kwargs):
            return DynamicCache.update(self, *args, **kwargs)

        def tokens_seen(self, layer=0):
            return DynamicCache.get_seq_length(self, layer)

        update = get_seq_length = None

    monkeypatch.setattr(caches, "_fresh", lambda of_layer: Other())
    assert caches.update_method.__wrapped__() == "append"
    monkeypatch.setattr(caches, "update_method", lambda of_layer=False: "append")
    assert caches.length_method.__wrapped__() == "tokens_seen"


def test_a_cache_that_stores_in_no_known_way_is_refused(monkeypatch):
    class Nothing:
        def read(self):
            return 3

    monkeypatch.setattr(caches, "_fresh", lambda of_layer: Nothing())
    with pytest.raises(ap.UpstreamChanged, match="no method by which a cache stores keys and values"):
        caches.update_method.__wrapped__()


def test_the_keywords_of_attention_are_told_by_their_values():
    given = {"softmax_scale": 8**-0.5, "rate": 0.125, "other": 3}
    wanted = {words.DROPOUT: 0.125, words.SCALING: 8**-0.5}
    assert calls._matched(tuple(wanted), given, wanted) == {words.DROPOUT: "rate", words.SCALING: "softmax_scale"}
    with pytest.raises(ap.UpstreamChanged, match="no keyword `scaling` among rate, other"):
        calls._matched(tuple(wanted), {"rate": 0.125, "other": 3}, wanted)


def test_an_attention_function_is_called_in_the_words_and_places_of_the_release(monkeypatch):
    strange = calls.Interface((1, 2, 3, 4, "visible"), {words.SCALING: "softmax_scale"}, {}, False, "is_causal")
    monkeypatch.setattr(calls, "_KNOWN", strange)
    seen = []

    def function(module, query, key, value, mask, scaling=None):
        seen.append((module, query, key, value, mask, scaling))

    calls.attention_registered(function)("in front", "m", "q", "k", "v", visible="mask", softmax_scale=0.5)
    assert seen == [("m", "q", "k", "v", "mask", 0.5)]
