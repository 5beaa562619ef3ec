"""Mean loss, its interval over documents, and the growth of the cache, each against an independent computation."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_attnpatch import evaluation
from hf_attnpatch.evaluation import summarise


def llama(kv_heads=4, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=kv_heads, **sizes)).to(dtype)


def blocks():
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate([12, 12, 7, 12, 7, 12]):
        ids = torch.randint(40, (length,), generator=generator)
        labels = ids.clone()
        labels[3 : 3 + number] = -100
        found.append({"input_ids": ids, "labels": labels, "document": "abbccc"[number]})
    return found


def by_hand(model, block):
    """Token by token, in double precision."""
    logits = model(block["input_ids"][None]).logits[0].double()
    total, count = 0.0, 0
    for position, label in enumerate(block["labels"].tolist()[1:]):
        if label != -100:
            row = logits[position]
            total += math.log(row.exp().sum().item()) - row[label].item()
            count += 1
    return total, count


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_token_weighs_the_same_whatever_the_batch(batch):
    model = llama()
    score = evaluation.mean_loss(model.train(), blocks(), batch=batch)
    assert model.training
    pairs = [by_hand(model.eval(), block) for block in blocks()]
    assert score.tokens == sum(count for _, count in pairs)
    assert score.nats == pytest.approx(sum(total for total, _ in pairs) / score.tokens, abs=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nats))
    assert score.losses["b"][0] == pytest.approx(pairs[1][0] + pairs[2][0], abs=1e-4)


def test_labels_and_documents_may_be_left_out():
    plain = [{"input_ids": block["input_ids"]} for block in blocks()]
    score = evaluation.mean_loss(llama(), plain)
    assert set(score.losses) == set(range(6))
    assert score.tokens == sum(len(block["input_ids"]) - 1 for block in plain)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        counts = torch.randint(50, 150, (60,), generator=generator)
        means = 2 + 0.5 * torch.randn(60, generator=generator)
        losses = {n: (float(m * c), int(c)) for n, (m, c) in enumerate(zip(means, counts, strict=True))}
        score = evaluation.summarise(losses, resamples=500)
        hits += score.low <= 2 <= score.high
    assert 180 <= hits <= 198  # 95 % of 200, less the bootstrap's known optimism at 60 documents


def test_a_paired_difference_is_exact_where_every_document_agrees():
    spread = {n: (float(100 * n), 100) for n in range(10)}
    shifted = {n: (total + 25.0, count) for n, (total, count) in spread.items()}
    before, after = evaluation.summarise(spread), evaluation.summarise(shifted)
    gap = evaluation.difference(before, after)
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.25, 0.25, 0.25))
    assert before.high - before.low > 2
    with pytest.raises(ValueError, match="different documents"):
        evaluation.difference(before, evaluation.summarise(shifted | {11: (1.0, 1)}))


@pytest.mark.parametrize("nothing", [[], [{"input_ids": torch.tensor([1])}]])
def test_nothing_to_predict_is_an_error(nothing):
    with pytest.raises(ValueError, match="no token to predict"):
        evaluation.mean_loss(llama(), nothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_grows_by_what_the_shapes_say(dtype):
    for heads in (4, 2, 1):
        grown = evaluation.cache_bytes_per_token(llama(heads, dtype))
        assert grown == 3 * 2 * heads * 8 * dtype.itemsize  # layers, key and value, heads, head_dim


def test_what_does_not_grow_does_not_count():
    config = MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        sliding_window=8,
    )
    assert evaluation.cache_bytes_per_token(MistralForCausalLM(config), length=16) == 0
    assert evaluation.cache_bytes_per_token(MistralForCausalLM(config), length=3) == 2 * 8 * 4
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    assert evaluation.cache_bytes_per_token(gpt2) == 2 * 2 * 16 * 4


def test_a_model_without_a_cache_is_an_error():
    class Bare(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(past_key_values=None)

    with pytest.raises(ValueError, match="no cache"):
        evaluation.cache_bytes_per_token(Bare(1, 1))


def test_a_perplexity_beyond_floats_is_infinite():
    """A broken patch may lose more than 709 nats a token; its report is still wanted."""
    found = summarise({"a": (3000.0, 2), "b": (2000.0, 2)})
    assert (found.nats, found.perplexity) == (1250.0, math.inf)
    assert summarise({"a": (709.0, 1)}).perplexity == math.exp(709.0)
