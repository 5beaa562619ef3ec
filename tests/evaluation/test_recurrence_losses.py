"""Evaluation by recurrence: every token of every document once, under the context that its model gives it."""

import pytest
import torch
from architectures import tiny_model
from torch.nn import functional as F  # noqa: N812

import hf_attnpatch as ap
from hf_attnpatch.errors import EvaluationError
from hf_attnpatch.evaluation.recurrence import document_tokens, recurrence

DOCUMENTS = {
    name: torch.randint(5, 99, (n,), generator=torch.Generator().manual_seed(n))
    for name, n in zip("abcde", (40, 9, 2, 61, 33), strict=True)
}


@pytest.fixture
def model():
    made = tiny_model("llama", max_position_embeddings=512)
    ap.patch_segment_recurrence(made, segment_length=8, memory_length=12)
    return made


@torch.no_grad()
def _alone(model, ids):
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:], reduction="none").double()


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("columns", [8, 16, 13])
def test_every_token_once_as_if_its_document_were_read_alone(model, rows, columns):
    found = {name: [] for name in DOCUMENTS}
    for name, first, losses in document_tokens(model, ap.stream(model), DOCUMENTS, rows=rows, columns=columns):
        assert first == 1 + sum(map(len, found[name]))
        found[name].append(losses)
    for name, ids in DOCUMENTS.items():
        torch.testing.assert_close(torch.cat(found[name]), _alone(model, ids), atol=1e-5, rtol=1e-5)


def test_the_mean_is_over_tokens(model):
    model.train()
    score = recurrence(model, ap.stream(model), DOCUMENTS, columns=16)
    assert model.training
    model.eval()
    wanted = torch.cat([_alone(model, ids) for ids in DOCUMENTS.values()])
    assert score.tokens == len(wanted)
    assert score.nats == pytest.approx(float(wanted.mean()), abs=1e-6)
    assert score.low <= score.nats <= score.high


def test_documents_that_cannot_be_read(model):
    with pytest.raises(EvaluationError, match="document a: 1 tokens"):
        recurrence(model, ap.stream(model), {"a": [5]})
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(EvaluationError, match="document d: the loss"):
        recurrence(model, ap.stream(model), DOCUMENTS, rows=1)
