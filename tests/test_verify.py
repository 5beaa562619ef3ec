"""``verify``: it finds what is broken, says so, and leaves the model as it was."""

import random

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from media_models import media_model
from snapshot import snapshot
from transformers import AttentionInterface, DynamicCache

import hf_attnpatch as ap
from hf_attnpatch.invariants import INVARIANTS, SAVING, WAYS, Subject
from hf_attnpatch.media import IMAGE
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE, PASS, find


def _noisy(model):
    def hook(module, args, output):
        return output + 0.01 * torch.randn_like(output)

    model.model.embed_tokens.register_forward_hook(hook)


def _noisy_logits(model):
    def hook(module, args, output):
        return output + 0.01 * torch.randn_like(output)

    model.get_output_embeddings().register_forward_hook(hook)


def _peeks(model):
    model.model.norm.register_forward_hook(lambda m, a, out: out + out.roll(-1, 1))


def _ignores_the_mask(model):
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, a, kw: (a, {**kw, "attention_mask": None}), with_kwargs=True)


def _mixes_the_batch(model):
    model.model.norm.register_forward_hook(lambda m, a, out: out + out.mean(0, keepdim=True))


def _forgets_the_cache(model):
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda m, a, kw: (a, {**kw, CACHE: None}), with_kwargs=True)


def _counts_anew(model):
    def hook(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        return args, {**kwargs, "position_ids": torch.arange(ids.shape[1])[None]}

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def _remembers(model):
    longest = [0]

    def hook(module, args, output):
        longest[0] = max(longest[0], output.shape[1])
        return output * longest[0]

    model.model.norm.register_forward_hook(hook)


def _is_not_saved(model):
    model.model.norm.register_forward_hook(lambda m, a, out: 2 * out)


class _Shared:
    """A hook that computes with the weights it was made with, whatever model it is copied into."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, module, args, output):
        return args[0] @ self.weight.t()

    def __deepcopy__(self, memo):
        return self


def _computes_elsewhere(model):
    projection = model.model.layers[0].self_attn.o_proj
    projection.register_forward_hook(_Shared(projection.weight))


def _is_detached(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: out.detach())


def _recomputes_otherwise(model):
    calls = [0]

    def hook(module, args, output):
        calls[0] += 1
        return output * (1.5 if calls[0] == 4 else 1)  # two plain runs, then a forward and its recomputation

    model.model.layers[0].input_layernorm.register_forward_hook(hook)


SABOTAGE = [
    (_noisy, "two forwards are equal"),
    (_peeks, "later tokens do not matter"),
    (_peeks, "cached decoding, token by token"),
    (_forgets_the_cache, "cached decoding, token by token"),
    (_forgets_the_cache, "cached decoding, two chunks"),
    (_ignores_the_mask, "cached decoding after padding"),
    (_ignores_the_mask, "padding does not matter"),
    (_mixes_the_batch, "alone or in a batch"),
    (_remembers, "first request or after a longer one"),
    (_is_not_saved, "saved and loaded"),
    (_is_not_saved, "saved in shards and loaded"),
    (_computes_elsewhere, "deepcopy"),
    (_is_detached, "gradients reach the attention"),
    (_recomputes_otherwise, "gradient checkpointing"),
    (_forgets_the_cache, "static cache, chunked prefill"),
    (_forgets_the_cache, "assisted decoding"),
    (_forgets_the_cache, "beams"),
    (_counts_anew, "learned prefix (PEFT's prefix tuning)"),
]


EVERY = {**INVARIANTS, **WAYS}


def _ask(model, invariant):
    ids = tiny_inputs(model, length=20)["input_ids"]
    return find(invariant, EVERY[invariant], Subject(model, ap.describe(model), {"input_ids": ids}))


@pytest.mark.parametrize(("sabotage", "invariant"), SABOTAGE, ids=lambda v: getattr(v, "__name__", v))
def test_what_is_broken_is_found(sabotage, invariant):
    model = tiny_model("llama")
    assert _ask(model, invariant).outcome == PASS
    sabotage(model)
    finding = _ask(model, invariant)
    assert finding.outcome == FAIL
    assert finding.measured is None or finding.measured > finding.tolerance


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_a_kernel_that_disagrees_is_found(name, monkeypatch):
    from transformers.models.llama import modeling_llama

    def wrong(module, query, *args, **kwargs):
        return query.transpose(1, 2).contiguous(), None

    model = tiny_model("llama", attn_implementation="sdpa" if name == "eager" else "eager")
    invariant = f"{name.partition('_')[0]} {'attention ' if name != 'sdpa' else ''}agree".strip() + "s"
    assert _ask(model, invariant).outcome == PASS
    if name == "eager":
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", wrong)
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, name, wrong)
    assert _ask(model, invariant).outcome == FAIL


def test_every_invariant_can_fail():
    kernels = {"eager attention agrees", "sdpa agrees", "flex attention agrees"}
    media = {"images, sound, several axes of positions"}  # below
    assert {invariant for _, invariant in SABOTAGE} | kernels | media == set(EVERY)


@pytest.mark.parametrize(
    ("invariant", "cache", "broken"),
    [
        ("beams", DynamicCache, "reorder_cache"),
        ("assisted decoding", DynamicCache, "crop"),
    ],
)
def test_a_cache_that_does_not_follow_is_found(invariant, cache, broken, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(cache, broken, lambda *_: None)
    assert _ask(model, invariant).outcome == FAIL


def _media(model):
    name = "images, sound, several axes of positions"
    return find(name, WAYS[name], Subject(model, ap.describe(model), {"input_ids": torch.arange(20, 44).view(2, 12)}))


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "whisper"])
def test_models_are_asked_with_what_their_processor_makes(model_type):
    model = media_model(model_type)
    found = _media(model)
    assert found.outcome == PASS, found
    assert IMAGE in found.note or "input_features" in found.note or "axes" in found.note
    _noisy_logits(model)
    assert _media(model).outcome == FAIL


def test_decoding_after_an_image_is_held_to_the_full_forward():
    """A model that forgets all but the image's tokens once it decodes."""
    model = media_model("llava")
    for layer in model.get_decoder().layers[1:]:
        layer.register_forward_pre_hook(lambda m, a, kw: (a, {**kw, CACHE: None}), with_kwargs=True)
    assert _media(model).outcome == FAIL


def test_a_prefix_that_is_seen_both_ways_is_said_and_not_failed():
    found = _media(media_model("paligemma"))
    assert found.outcome == PASS
    assert "with an image and types of tokens, earlier tokens see later ones" in found.note


@pytest.mark.parametrize(
    "patch", [ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.Alibi(), ap.Rotary()], ids=lambda p: p.name
)
def test_a_patched_model_is_run_in_every_way(patch):
    model = tiny_model("gpt2")
    ap.apply(model, patch)
    for way in [way for way in WAYS if "images" not in way]:
        assert _ask(model, way).outcome == PASS, way


def test_what_a_memory_cannot_is_refused_in_words_and_not_a_failure():
    model = tiny_model("llama")
    ap.apply(model, ap.SegmentRecurrence(segment_length=8, memory_length=8))
    assert _ask(model, "beams").outcome == PASS
    found = _ask(model, "assisted decoding")
    assert found.outcome == NOT_APPLICABLE
    assert "requires a cache that can be cropped" in found.note


def test_one_that_raises_fails_and_says_how():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda m, a, out: out + torch.zeros(3))
    finding = _ask(model, "two forwards are equal")
    assert (finding.outcome, finding.measured) == (FAIL, None)
    assert "RuntimeError" in finding.note


def test_not_a_number_fails():
    model = tiny_model("llama")
    model.lm_head.weight.data[0, 0] = float("nan")
    assert _ask(model, "two forwards are equal").outcome == FAIL


@pytest.mark.parametrize(
    ("model_type", "overrides", "patch"),
    [
        ("llama", {}, None),
        ("llama", {"max_position_embeddings": 16}, ap.RopeScaling(kind="dynamic", factor=4)),
        ("gemma3_text", {"max_position_embeddings": 16}, ap.RopeScaling(kind="longrope", factor=4)),
        ("gpt2", {}, ap.GroupedQuery(num_kv_heads=2)),
        ("qwen3_next", {}, None),
        ("mixtral", {}, ap.Flash(backend="sdpa")),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_bitwise_as_it_was(model_type, overrides, patch, training):
    model = tiny_model(model_type, **overrides)
    if patch is not None:
        ap.apply(model, patch)
    model(**tiny_inputs(model, length=40))  # whatever it remembers of a request, it must still remember afterwards
    if training:
        model.train()
        model.get_input_embeddings().eval()  # an odd mixture of modes
        model(**tiny_inputs(model), labels=tiny_inputs(model)["input_ids"]).loss.backward()
    before, state, seed = snapshot(model), torch.random.get_rng_state(), random.getstate()
    ap.verify(model)
    after = snapshot(model)
    for part in before:
        assert after[part] == before[part], part
    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == seed


def test_an_unbroken_model_passes_and_prints():
    found = ap.verify(tiny_model("llama"))
    assert found.passed
    assert [f.invariant for f in found.findings] == list(EVERY)
    text = str(found)
    assert "LlamaForCausalLM: nothing failed" in text
    assert all(invariant.split("(")[0] in text for invariant in EVERY)
    assert found["sdpa agrees"].outcome == NOT_APPLICABLE
    assert found["sdpa agrees"].note == "it is the present one"


def test_a_broken_model_does_not_pass_and_the_print_says_where():
    model = tiny_model("llama")
    _is_not_saved(model)
    found = ap.verify(model)
    assert not found.passed
    assert "2 failed: saved and loaded; saved in shards and loaded" in str(found)


def test_saving_can_be_left_out():
    found = ap.verify(tiny_model("gpt2"), save=False)
    assert {f.invariant for f in found.findings} == set(EVERY) - set(SAVING)


def test_ways_can_be_left_out():
    assert [f.invariant for f in ap.verify(tiny_model("gpt2"), ways=False, save=False).findings] == [
        name for name in INVARIANTS if name not in SAVING
    ]


def test_an_encoder_is_not_asked_what_only_decoders_do():
    found = ap.verify(tiny_model("bert", encoder=True))
    assert found.passed
    for invariant in ("later tokens do not matter", "cached decoding, two chunks", "cached decoding after padding"):
        assert found[invariant].outcome == NOT_APPLICABLE
    assert found["padding does not matter"].outcome == PASS


def test_an_encoder_decoder_is_verified_too():
    model = tiny_model("bart", encoder=True)
    assert model.config.is_encoder_decoder
    found = ap.verify(model)
    assert found.passed, f"\n{found}"
    assert found["cached decoding, token by token"].outcome == PASS
    assert found["padding does not matter"].outcome == PASS


def test_frozen_attention_has_no_gradients_to_ask_for():
    model = tiny_model("llama").requires_grad_(False)
    found = ap.verify(model, save=False)
    assert found["gradients reach the attention"].outcome == NOT_APPLICABLE
    assert found["gradient checkpointing"].outcome == NOT_APPLICABLE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_their_own_tolerance(dtype):
    found = ap.verify(tiny_model("llama", dtype=dtype), save=False)
    assert found.passed, f"\n{found}"
    assert found["padding does not matter"].tolerance != 1e-5


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "inputs is empty"),
        ({"inputs_embeds": torch.ones(2, 12, 64)}, "no input_ids"),
        ({"input_ids": torch.ones(1, 12, dtype=torch.long)}, r"shape \(1, 12\).* at least 2 rows of 8"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, "at least 2 rows of 8"),
        ({"input_ids": torch.ones(12, dtype=torch.long)}, "at least 2 rows of 8"),
        (
            {"input_ids": torch.ones(2, 12, dtype=torch.long), "attention_mask": torch.zeros(2, 12)},
            "'attention_mask'.* masks something",
        ),
    ],
)
def test_inputs_that_will_not_do(inputs, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.verify(tiny_model("llama"), inputs=inputs)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None, "llama"])
def test_what_is_no_transformers_model_is_refused(model):
    with pytest.raises(ap.UnsupportedArchitecture, match="not a transformers model"):
        ap.verify(model)
