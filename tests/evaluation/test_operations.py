"""What a model computes, followed without data: counted by hand, and held to what the model itself keeps."""

import pytest
import torch
from caches import CACHE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_attnpatch as ap
from hf_attnpatch.evaluation.listener import PARTS
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.evaluation.operations import Phantom

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 100}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **HEADS, **fields})).eval()


def narrow_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0))
    ap.patch_grouped_query(model, num_kv_heads=2, method="first")
    return model.eval()


def scaled(kind):
    model = llama(max_position_embeddings=16)
    ap.patch_rope_scaling(model, kind=kind, factor=4)
    return model


MODELS = {
    "llama": llama,
    "gpt2, grouped": narrow_gpt2,
    "sliding window": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS, head_dim=8, sliding_window=8)).eval(),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, **HEADS, num_local_experts=4)).eval(),
    "dynamic rope": lambda: scaled("dynamic"),
    "longrope": lambda: scaled("longrope"),
}


def seen(each, **wanted):
    return [op for op in each.operations if all(getattr(op, name) == value for name, value in wanted.items())]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cache_bytes_are_those_of_the_real_cache(name):
    model = MODELS[name]()
    ids = torch.arange(48).view(2, 24)
    cache = model(input_ids=ids, use_cache=True)[CACHE]
    filled, decoded = Phantom(model).decode(2, 24)
    assert filled.cache_bytes == held_bytes(cache) > 0
    model(input_ids=ids[:, :1], **{CACHE: cache}, use_cache=True)
    assert decoded.cache_bytes == held_bytes(cache)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_alone(name):
    model = MODELS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Phantom(model).decode(1, 24)
    Phantom(model).training(1, 24)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.device.type == "cpu" and type(p.data) is torch.Tensor for p in model.parameters())


def test_operations_are_counted_as_by_hand():
    tokens = 24
    model = llama(tie_word_embeddings=False)
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)  # q, k, v, o, MLP of two layers
    scores = 2 * 2 * 2 * 4 * 8 * tokens * tokens // 2  # layers, products, heads of 8, the causal half
    filled, decoded = Phantom(model).decode(1, tokens)
    assert (
        sum(op.flops for op in filled.operations) == 2 * tokens * weights + 2 * 32 * 100 + scores
    )  # one row of logits
    scores = 2 * 2 * 2 * 4 * 8 * (tokens + 1)
    assert sum(op.flops for op in decoded.operations) == 2 * (weights + 32 * 100) + scores
    trained = Phantom(model).training(1, tokens)
    weighs = sum(op.flops for op in seen(trained, part="weights"))
    assert weighs == 3 * 2 * tokens * (weights + 32 * 100)  # forward, and a product for each of the two gradients


def test_operations_know_what_they_are_for():
    _, decoded = Phantom(llama()).decode(2, 24)
    assert {op.part for op in decoded.operations} == set(PARTS)
    copies = [op for op in seen(decoded, name="cat", part="cache")]
    old, new = 2 * 2 * 24 * 8 * 4, 2 * 2 * 8 * 4  # batch, heads, tokens, head_dim, bytes
    assert [[size for size, _ in op.reads] for op in copies] == [[old, new]] * 4  # keys and values of two layers
    assert [op.written for op in copies] == [old + new] * 4
    assert [dict(op.size)["group"] for op in seen(decoded, kind="attention")] == [2, 2]


def test_eager_attention_repeats_heads_and_holds_scores():
    model = llama()
    model.set_attn_implementation("eager")
    filled, decoded = Phantom(model).decode(1, 24)
    assert not seen(filled, kind="attention")
    assert len(seen(filled, kind="softmax", part="attention")) == 2
    assert len(seen(decoded, name="clone", part="cache")) == 4  # keys and values, repeated for their group
    fused = Phantom(llama()).decode(1, 24)[0]
    assert filled.peak_bytes >= fused.peak_bytes + 4 * 24 * 24 * 4  # heads, queries, keys, bytes


def test_weights_were_last_read_a_whole_step_ago():
    _, decoded = Phantom(llama()).decode(1, 24)
    whole = sum(sum(size for size, _ in op.reads) + op.written for op in decoded.operations)
    for op in seen(decoded, kind="matmul"):
        assert max(op.reads)[1] == whole
    first, second = seen(decoded, name="cat", part="cache")[:2]
    assert second.reads[0][1] == first.reads[0][1] == whole


def test_training_makes_no_mask_and_holds_gradients():
    model = llama()
    trained = Phantom(model).training(1, 24)
    assert not [op for op in trained.operations if op.name == "cumsum"]  # transformers looks for packed sequences so
    assert len(seen(trained, kind="attention_backward")) == 2
    assert trained.peak_bytes > sum(p.numel() * 4 for p in model.parameters())


class Branching(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(input_ids=input_ids[:, input_ids[0].nonzero()[:, 0]], **kwargs)


def test_what_cannot_be_followed_is_an_error():
    model = Branching(LlamaConfig(**SHAPE, **HEADS))
    with pytest.raises(ap.EvaluationError, match=r"Branching cannot be followed .* Measure it instead"):
        Phantom(model).decode(1, 8)
    pair = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(ap.EvaluationError, match="T5ForConditionalGeneration is an encoder and a decoder in one"):
        Phantom(pair)
