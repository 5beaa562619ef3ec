"""The model in the package is what its card says."""

import json

import numpy as np
import pytest
import torch

from hf_attnpatch import embedded
from recipes import evaluate_embedded, model_card

METRICS = {row["domain"]: row for row in json.loads((evaluate_embedded.RESULTS / "metrics.json").read_text())}


def test_it_is_the_model_that_was_asked_for():
    model = embedded.load_model()
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (8, 8, 512)
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (embedded.path() / "model.safetensors").stat().st_size <= 16e6
    half = embedded.load_model(torch.bfloat16)
    for rounded, exact in zip(half.parameters(), model.parameters(), strict=True):
        assert torch.equal(rounded.float(), exact)


@pytest.mark.parametrize("domain", embedded.DOMAINS)
def test_it_models_the_heldout_text_as_its_card_says(domain):
    """On the first 4 windows of four documents; the card's figure is over all of them, hence the wide margin."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    texts = embedded.heldout(domain)
    assert len(texts) == METRICS[domain]["documents"]
    assert min(map(len, texts)) >= 16_000
    documents = [ids[:2044] for ids in tokenizer([text[:20_000] for text in texts[:4]], verbose=False)["input_ids"]]
    tokens = sum(map(len, documents))
    loss = evaluate_embedded.model_loss(model, documents, tokenizer.eos_token_id, 512) / tokens
    unigram = evaluate_embedded.unigram_loss(evaluate_embedded.unigram_counts(), documents) / tokens
    assert loss == pytest.approx(METRICS[domain]["loss"], abs=0.6)
    assert loss < unigram - 1.5


def test_the_card_shows_the_measured_figures():
    card = (embedded.path() / "README.md").read_text()
    for row in METRICS.values():
        assert f"| **{row['loss']:.3f}** | {row['unigram']:.3f} |" in card
    log = [json.loads(line) for line in (embedded.path() / "training_log.jsonl").read_text().splitlines()]
    assert np.all(np.diff([record["step"] for record in log]) > 0)
    assert f"in {log[-1]['step']} steps" in card.replace("\n", " ")


def test_an_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="choose from python, prose, docs"):
        embedded.heldout("poems")


def test_the_card_says_what_the_overlap_file_says():
    """Written by two commands; `render` must not lose what the other one measured."""
    rows = json.loads((embedded.path() / "overlap.json").read_text())
    assert model_card.overlap(rows) in (embedded.path() / "README.md").read_text("utf-8")
    assert "{overlap}" in model_card.CARD
