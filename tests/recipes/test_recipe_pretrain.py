"""The pretraining recipe in two steps, and how the embedded model is measured."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import tiny

from hf_attnpatch import embedded
from recipes import evaluate_embedded, pretrain
from recipes.settings import SettingsError

MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def configuration(tmp_path, **train):
    values = {
        "tokenizer": {"path": str(tmp_path / "tokenizer"), "vocab_size": 300},
        "data": {"source": str(tmp_path / "text"), "block": 32, "cache": str(tmp_path / "cache")},
        "heldout": str(tmp_path / "text"),
        "model": MODEL,
        "train": {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 4, "log_every": 1, "eval_every": 2}
        | train,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def launch(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
    pretrain.main()


def test_it_goes_on_from_a_model_that_there_is(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    path = configuration(tmp_path)
    launch(monkeypatch, "--config", path)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    again = f"train.output={tmp_path / 'again'}", f"model={tmp_path / 'run/model'}"
    launch(monkeypatch, "--config", path, *(word for each in (*again, "train.lr=0.0") for word in ("--set", each)))
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again/model")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(SettingsError, match="give the model's own"):
        launch(monkeypatch, "--config", path, "--set", again[1], "--set", "tokenizer.path=embedded")


def test_two_steps_save_a_model_that_loads_and_go_on(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    path = configuration(tmp_path, save_every=2)
    launch(monkeypatch, "--config", path)
    launch(monkeypatch, "--config", path, "--resume", "--set", "train.steps=3")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3]
    assert {"step", "loss", "lr", "tokens", "seconds", "heldout_loss"} <= set(log[-1])
    assert log[0]["tokens"] == 4 * 31
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.vocab_size == len(tokenizer)
    text = "fox \u00e9\u4e16\x00 dog"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_kind_of_model_is_a_value_and_the_seed_is_its_weights():
    tokenizer = embedded.load_tokenizer()
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    models = [pretrain.new_model(values, tokenizer, seed) for values, seed in ((gpt2, 0), (gpt2, 0), (gpt2, 1))]
    assert models[0].transformer.wpe.weight.shape == (32, 16)
    assert torch.equal(models[0].transformer.wpe.weight, models[1].transformer.wpe.weight)
    assert not torch.equal(models[0].transformer.wpe.weight, models[2].transformer.wpe.weight)
    assert pretrain.new_model(MODEL, tokenizer, 0).config.model_type == "llama"


def test_missing_text_is_an_error_before_the_model_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "new_model", lambda *_: pytest.fail("the model was made first"))
    with pytest.raises(ValueError, match="no such file or folder"):
        launch(monkeypatch, "--config", configuration(tmp_path))


def test_windows_predict_every_token_once():
    ids = list(range(1, 41))
    for length in (2, 7, 16, 64):
        predicted = [token for piece in evaluate_embedded.windows(ids, 0, length) for token in piece[1:].tolist()]
        assert predicted == ids
        assert max(len(piece) for piece in evaluate_embedded.windows(ids, 0, length)) <= length


def test_model_and_unigram_loss_against_one_token_at_a_time():
    model = tiny().eval()
    documents = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]]
    total = 0.0
    for piece in (piece for ids in documents for piece in evaluate_embedded.windows(ids, 0, 8)):
        for end in range(1, len(piece)):
            with torch.no_grad():
                total -= model(piece[None, :end]).logits[0, -1].log_softmax(-1)[piece[end]].item()
    assert evaluate_embedded.model_loss(model, documents, 0, 8, batch=3) == pytest.approx(total, abs=1e-4)
    counts = np.arange(50)
    expected = -sum(math.log((token + 1) / (counts.sum() + 50)) for ids in documents for token in ids)
    assert evaluate_embedded.unigram_loss(counts, documents) == pytest.approx(expected)
