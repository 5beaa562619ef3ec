"""How near a model is to its original, against plain arithmetic; greedy decoding against transformers' own."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from measured_models import MODELS, gpt2, llama

from hf_attnpatch import EvaluationError, evaluation
from hf_attnpatch.evaluation import generation, logits


def rows(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, (size,), generator=generator) for size in sizes]


def batch(*sizes, side="left"):
    width = max(sizes)
    ids, mask = torch.full((len(sizes), width), 3), torch.zeros(len(sizes), width, dtype=torch.int64)
    for number, row in enumerate(rows(*sizes)):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("elements", [2**25, 700])
def test_a_model_is_itself(name, elements, monkeypatch):
    monkeypatch.setattr(logits, "_ELEMENTS", elements)
    model = MODELS[name]()
    found = evaluation.fidelity(model, model, [batch(12, 9, 12)], continuation=5)
    assert (found.kl.nats, found.kl.low, found.kl.high) == (0, 0, 0)
    assert (found.top1.value, found.continuation.value) == (1, 1)
    assert found.kl.tokens == 33


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_models_by_hand(side):
    one, other = llama(1), llama(2)
    with torch.no_grad():
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            b.copy_(a + 0.02 * b)
    found = evaluation.fidelity(one, other, [batch(12, 9, 12, side=side), batch(7)], continuation=6)
    kl, same, kept, count = 0.0, 0, 0, 0
    for row in [*rows(12, 9, 12), *rows(7)]:
        with torch.no_grad():
            p, q = (model(row[None]).logits[0].double().log_softmax(-1) for model in (one, other))
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(row)
        a, b = row[None], row[None]
        for _ in range(6):
            with torch.no_grad():
                a, b = (
                    torch.cat([x, m(x).logits[:, -1].argmax(-1, keepdim=True)], 1) for x, m in ((a, one), (b, other))
                )
            kept += torch.equal(a, b)
    assert found.kl.nats == pytest.approx(kl / count, rel=1e-4)
    assert found.top1.value == same / count
    assert found.continuation.value == kept / 24
    assert 0 < found.kl.nats < 1
    assert 0 < found.top1.value < 1
    assert 0 < found.continuation.value < 1


def test_padding_changes_nothing():
    one, other = llama(1), llama(2)
    padded = evaluation.fidelity(one, other, [batch(12, 5)])
    alone = evaluation.fidelity(one, other, [{"input_ids": row[None]} for row in rows(12, 5)])
    assert list(padded.kl.losses.values()) == [pytest.approx(pair, rel=1e-6) for pair in alone.kl.losses.values()]
    assert padded.top1 == alone.top1


def test_results_survive_json_and_modes_are_put_back():
    one, other = llama(1).train(), llama(2)
    found = evaluation.fidelity(one, other, [batch(8, 8)], continuation=2)
    assert evaluation.Fidelity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert one.training
    assert not other.training
    assert f"{found.kl.nats:.6f}" in str(found)
    without = evaluation.fidelity(one, other, [batch(8, 8)], continuation=0)
    assert without.continuation is None
    assert evaluation.Fidelity.from_dict(json.loads(json.dumps(without.to_dict()))) == without


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([], "no batches"),
        ([{"input_ids": torch.ones(1, 3), "attention_mask": torch.zeros(1, 3)}], "batch 0 row 0: .* keeps 0 tokens"),
        ([{"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 0, 1]])}], "batch 0 row 0: .* one run"),
        ([{"input_ids": torch.ones(3)}], r"batch 0: input_ids of shape \(3,\)"),
    ],
)
def test_rows_that_cannot_be_compared(rest, message):
    with pytest.raises(EvaluationError, match=message):
        evaluation.fidelity(llama(), llama(), rest)


def test_other_vocabularies_and_nan():
    with pytest.raises(EvaluationError, match="vocabulary of 40, the patched model one of 48"):
        evaluation.fidelity(llama(), llama(vocab_size=48), [batch(4)], continuation=0)
    broken = llama()
    broken.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(EvaluationError, match="batch 0 row 0: logits of the patched model are not finite"):
        evaluation.fidelity(llama(), broken, [batch(4, 4)])
    with pytest.raises(EvaluationError, match="row 0 of a batch of 2: logits that are not finite after 4 tokens"):
        generation.prefill(broken, batch(4, 4)["input_ids"])


def test_a_model_without_a_cache_is_an_error():
    class Bare(type(llama())):
        def forward(self, **inputs):
            return SimpleNamespace(logits=super().forward(**inputs).logits, past_key_values=None)

    bare = Bare(llama().config).eval()
    with pytest.raises(EvaluationError, match="Bare returned no cache"):
        evaluation.fidelity(bare, bare, [batch(4)])
    assert evaluation.fidelity(bare, bare, [batch(4)], continuation=0).kl.nats == 0


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_is_transformers_own(name):
    model = MODELS[name]()
    ids = torch.stack(rows(12, 12, 12))
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 12:]
    assert torch.equal(generation.greedy(model, ids, 20), wanted)
    _, past = generation.prefill(model, ids[:, :7])
    assert torch.equal(generation.greedy(model, ids[:, 7:], 20, past=past), wanted)
    asked = []
    short = generation.greedy(
        model, ids, 20, done=lambda added: asked.append(added.shape[1]) or added.shape[1] > 9, every=4
    )
    assert torch.equal(short, wanted[:, :12])
    assert asked == [4, 8, 12]


def test_decoding_beyond_a_table_of_positions_is_an_error():
    with pytest.raises(EvaluationError, match="max_position_embeddings=64"):
        evaluation.fidelity(gpt2(), gpt2(), [batch(60)], continuation=8)


@pytest.mark.parametrize("continuation", [-1, 1.5, True, None])
def test_a_continuation_that_is_no_count(continuation):
    with pytest.raises(EvaluationError, match="wanted a number of tokens"):
        evaluation.fidelity(llama(), llama(), [batch(4)], continuation=continuation)


@pytest.mark.parametrize(("given", "found"), [({"ids": [[1]]}, "fields ids"), ([[1, 2]], "list"), ("text", "str")])
def test_a_batch_without_ids_is_named(given, found):
    with pytest.raises(EvaluationError, match=f"batch 0: found .*{found}.*wanted a mapping with input_ids"):
        evaluation.fidelity(llama(), llama(), [given])
