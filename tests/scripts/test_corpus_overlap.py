"""What the embedded model has seen of its held-out text: exact counts, and a card that says what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import corpus_overlap
import readme

from hf_attnpatch import embedded
from recipes import model_card


def test_a_run_is_the_same_wherever_it_stands_and_at_token_borders_only():
    ids = list(range(4000, 4020))
    runs = list(corpus_overlap.runs(ids))
    assert len(runs) == len(ids) - corpus_overlap.LENGTH + 1
    assert len(set(runs)) == len(runs)
    assert list(corpus_overlap.runs([7, *ids, 7]))[1:-1] == runs
    assert not list(corpus_overlap.runs(ids[: corpus_overlap.LENGTH - 1]))


def test_the_loss_of_every_token_is_the_models():
    model, ids = embedded.load_model(), list(range(300, 320))
    found = corpus_overlap.losses(model, ids, 0, 8)
    start = torch.tensor([[0, *ids[:7]]])
    with torch.no_grad():
        logs = model(input_ids=start).logits[0].log_softmax(-1)
    assert found.shape == (20,)
    assert found[:7] == pytest.approx([-float(logs[i, each]) for i, each in enumerate(ids[:7])], abs=1e-4)


def test_another_corpus_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="run scripts/build_corpus.py first"):
        corpus_overlap.check(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text(json.dumps({"train": []}))
    with pytest.raises(SystemExit, match="another corpus"):
        corpus_overlap.check(tmp_path / "manifest.json")


def test_the_card_says_what_was_measured():
    rows = json.loads((embedded.path() / "overlap.json").read_text())
    assert [row["name"] for row in rows] == [*embedded.DOMAINS, "all"]
    card = (embedded.path() / "README.md").read_text("utf-8")
    assert card == readme.with_part(card, "overlap", model_card.overlap(rows))
