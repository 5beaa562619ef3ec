"""Text that a model writes itself: its own distribution, deterministic, and nothing of the model is touched."""

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation import mean_loss
from hf_attnpatch.heads.calibration_text import shuffled
from hf_attnpatch.heads.own_text import ROWS


def test_it_is_the_same_for_a_seed_and_leaves_the_model_alone():
    model = tiny_model("llama").train()
    model.generation_config.temperature = 0.01  # a checkpoint's own settings have no say
    before, state = snapshot(model), torch.get_rng_state()
    found = [ap.OwnText(sequences=ROWS + 2, length=9, seed=seed).write(model) for seed in (0, 0, 1)]
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0].shape == (ROWS + 2, 9)
    assert set(found[0][:, 0].tolist()) == {model.config.bos_token_id}
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_it_follows_the_model_s_own_probabilities():
    model = tiny_model("llama", vocab_size=8)
    ids = ap.OwnText(sequences=4000, length=2, start=5).write(model)
    with torch.no_grad():
        wanted = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    found = torch.bincount(ids[:, 1], minlength=8) / len(ids)
    assert float((found - wanted).abs().max()) < 5 * float((wanted * (1 - wanted) / len(ids)).sqrt().max())


def test_it_is_no_longer_than_the_window():
    model = tiny_model("llama", max_position_embeddings=16)
    assert ap.OwnText(sequences=1, length=512).write(model).shape == (1, 16)


@pytest.mark.parametrize("calibration", ["self", ap.OwnText(sequences=8, length=128)])
def test_a_patch_takes_it_alone_or_beside_other_text(calibration, monkeypatch):
    asked = []
    monkeypatch.setattr(ap.OwnText, "write", lambda own, model: asked.append(own) or torch.randint(128, (8, 128)))
    own = calibration if isinstance(calibration, ap.OwnText) else ap.OwnText()
    report = ap.patch_grouped_query(tiny_model("llama"), num_kv_heads=2, calibration=calibration, refine_steps=1)
    assert "refined" in str(report)
    assert asked == [own]
    text = torch.randint(128, (2, 64), generator=torch.Generator().manual_seed(0))
    ap.patch_grouped_query(tiny_model("llama"), num_kv_heads=2, calibration=[text, own], refine_steps=1)
    assert asked == [own, own]


def test_a_number_that_follows_from_it_is_chosen_on_the_text_that_is_fitted_on(monkeypatch):
    asked = []
    monkeypatch.setattr(ap.OwnText, "write", lambda own, model: asked.append(own) or torch.randint(128, (8, 128)))
    fields = {"num_kv_heads": "auto", "cache_target": 0.5, "calibration": "self", "refine_steps": 1}
    ap.patch_grouped_query(tiny_model("llama"), **fields)
    assert len(asked) == 1


def test_calibrated_on_its_own_text_a_real_model_loses_far_less_than_by_the_weights_alone():
    text = ap.OwnText(sequences=16, length=256).write(embedded.load_model())
    tokenizer, documents = embedded.load_tokenizer(), [texts[:6000] for texts in embedded.heldout()[:3]]
    ids = [torch.tensor(tokenizer(each, verbose=False)["input_ids"][:512]) for each in documents]
    windows = [{"input_ids": each, "document": number} for number, each in enumerate(ids)]
    losses = {}
    for method in ("principal", "calibrated"):
        model = embedded.load_model()
        ap.patch_grouped_query(
            model, num_kv_heads=2, method=method, calibration=text if method != "principal" else None
        )
        losses[method] = mean_loss(model, windows).nats
    original = mean_loss(embedded.load_model(), windows).nats
    assert losses["calibrated"] - original < 0.85 * (losses["principal"] - original)


@pytest.mark.parametrize(
    ("build", "fields", "words"),
    [
        (lambda: tiny_model("bert", encoder=True), {}, "does not write text from left to right"),
        (lambda: tiny_model("llama", bos_token_id=None, eos_token_id=None), {}, r"names None.*OwnText\(start"),
        (lambda: tiny_model("llama"), {"start": 10**6}, "names 1000000"),
    ],
)
def test_models_that_cannot_are_refused(build, fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.OwnText(**fields).write(build())


@pytest.mark.parametrize("fields", [{"sequences": 0}, {"length": 1}, {"seed": -1}, {"length": True}])
def test_bad_numbers_are_named(fields):
    with pytest.raises(ap.AttnPatchError, match=f"OwnText: {next(iter(fields))} is"):
        ap.OwnText(**fields)


def test_texts_of_several_sources_are_mixed():
    """Some stages look at the first batches only: those must hold something of every source."""
    text, own = torch.zeros(16, 8, dtype=torch.long), torch.ones(16, 8, dtype=torch.long)
    (whole,) = shuffled([{"input_ids": text}, {"input_ids": own}], seed=0)
    assert 3 < int(whole["input_ids"][:16, 0].sum()) < 13
    short = {"input_ids": torch.full((16, 5), 2)}
    pieces = [int(batch["input_ids"][0, 0]) for batch in shuffled([{"input_ids": text}, short], seed=0)]
    assert sorted(pieces) == [0] * 4 + [2] * 4
    assert pieces not in ([0] * 4 + [2] * 4, [2] * 4 + [0] * 4)
    alone = shuffled([{"input_ids": torch.arange(6)[:, None]}], seed=3)
    assert sorted(alone[0]["input_ids"][:, 0].tolist()) == list(range(6))
