"""Decoding as measured: bytes by hand, times that are times, and what cannot be measured."""

import json

import pytest
import torch
from measured_models import gpt2, llama
from transformers import BertConfig, BertForMaskedLM

import hf_attnpatch as ap
from hf_attnpatch import EvaluationError, evaluation
from hf_attnpatch.evaluation import decoding as function
from hf_attnpatch.evaluation.limits import Limits
from hf_attnpatch.evaluation.operations import Phantom


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """A machine of round numbers: nothing large is timed."""
    import sys

    monkeypatch.setattr(sys.modules["hf_attnpatch.evaluation.decoding"], "limits", lambda *_: Limits(1e9, 1e6))


def test_decoding_is_measured():
    model = llama().train()
    site = model.config
    found = function(model, contexts=(8, 24), batch=2, tokens=3)
    assert model.training
    assert [row.context for row in found.rows] == [8, 24]
    weights = sum(p.numel() * 4 for p in model.parameters())
    for row in found.rows:
        held = 2 * site.num_hidden_layers * 2 * site.num_key_value_heads * row.context * site.head_dim * 4
        assert row.cache_bytes == held == Phantom(model).decode(2, row.context)[0].cache_bytes
        assert row.prefill_tokens_per_second == pytest.approx(2 * row.context / row.prefill_seconds)
        assert row.decode_tokens_per_second == pytest.approx(2 / row.decode_seconds)
        embedding = 0 if site.tie_word_embeddings else (site.vocab_size - 2) * site.hidden_size * 4
        assert row.decode_limit == pytest.approx(
            2 * 1e6 / (weights - embedding + held + 2 * site.hidden_size * 4), rel=1e-2
        )
        assert row.peak_bytes is None or row.peak_bytes > weights
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_limit_of_prefill_is_its_operations():
    model = gpt2()
    (row,) = function(model, contexts=(16,), tokens=1, repeats=1).rows
    flops = sum(op.flops for op in Phantom(model).forward(1, 16).operations)
    assert row.prefill_limit == pytest.approx(16 * 1e9 / flops)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"contexts": ()}, r"contexts \[\]; wanted whole numbers above 0"),
        ({"contexts": (16, 0)}, r"contexts \[16, 0\]"),
        ({"batch": 1.5}, r"batch \[1.5\]"),
        ({"tokens": 0}, r"tokens \[0\]"),
    ],
)
def test_numbers_that_are_none_are_an_error(options, wanted):
    with pytest.raises(EvaluationError, match=wanted):
        function(llama(), **options)


def test_what_does_not_decode_is_an_error():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(EvaluationError, match="BertForMaskedLM t.* no cache"):
        function(BertForMaskedLM(BertConfig(**shape, vocab_size=20)), contexts=(8,))


def test_positions_that_end_are_an_error():
    model = gpt2()
    with pytest.raises(EvaluationError, match="context 4096: GPT2LMHeadModel cannot look up so many positions"):
        function(model, contexts=(4096,))


def test_logits_that_are_not_finite_are_an_error():
    model = llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="context 8: the logits of the last token are not finite"):
        evaluation.decoding(model, contexts=(8,))


def test_a_model_scaled_by_request_decodes_beyond_its_window():
    model = llama(max_position_embeddings=16)
    ap.patch_rope_scaling(model, kind="dynamic_yarn", factor=4)
    assert function(model, contexts=(8, 16), batch=2, tokens=3).rows[-1].context == 16
