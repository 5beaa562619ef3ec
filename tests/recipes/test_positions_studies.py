"""Studies of positions: cells, trainings that go on, refusals that are results, pages that say what was measured."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

import hf_attnpatch as ap
from hf_attnpatch.evaluation import perplexity, summarise
from recipes import loop
from recipes.comparison.store import Store
from recipes.positions import command, extend_page, heat, measure, page, study, switch_page, worker
from recipes.settings import SettingsError
from recipes.sources import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
YARN = {"patch": "rope_scaling", "kind": "yarn", "factor": 4}
ALIBI = {"patch": "alibi", "training": True}


def written(folder, cells, **changes):
    values = {
        "title": "A study",
        "output": str(folder / "results"),
        "measure": {
            "text": str(folder / "heldout"),
            "lengths": [16, 32, 64],
            "targets": 15,
            "bins": 4,
            "sliding": 5,
            "batch_tokens": 64,
        },
        "data": {"source": str(folder / "train"), "block": 64, "cache": str(folder / "cache")},
        "train": {"steps": 2, "batch_size": 1, "lr": 1e-2, "log_every": 1},
        "cells": [{"model": str(folder / "model"), **cell} for cell in cells],
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def launch(monkeypatch, folder, config, render, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)  # a run is a process's first, outside of tests
    monkeypatch.setattr("sys.argv", ["study.py", "--threads", "1", "--scratch", str(folder / "scratch"), *flags])
    command.main(None, config, render)
    return Store(folder / "results/metrics.jsonl")


def nats(row, length):
    return summarise({k: tuple(v) for k, v in row["lengths"][str(length)]["losses"].items()}).nats


@pytest.fixture
def learned(folder, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder / "learned")
    tokenizer.save_pretrained(folder / "learned")
    return str(folder / "learned")


def test_extension_measures_trains_goes_on_and_writes_its_page(folder, monkeypatch, capfd):
    cells = [
        {"name": "original", "baseline": True},
        {"name": "yarn", "patches": [YARN]},
        {"name": "ntk", "patches": [{**YARN, "kind": "ntk"}]},
        {"name": "yarn/trained", "patches": [YARN], "train": {}},
        {"name": "yarn/trained, skipping", "patches": [YARN], "train": {}, "data": {"block": 16, "skip_to": 64}},
    ]
    config = written(folder, cells, note="Chosen by nobody.")
    launch(monkeypatch, folder, config, extend_page.write, "--cells", "original")
    store = launch(monkeypatch, folder, config, extend_page.write)
    assert capfd.readouterr().out.count("] original") == 1  # the second run found it
    assert list(store.rows) == [cell["name"] for cell in cells]
    assert store.rows["yarn/trained"]["training"]["tokens"] == 2 * 63
    assert store.rows["yarn/trained, skipping"]["training"]["tokens"] == 2 * 15
    assert nats(store.rows["yarn/trained"], 64) < nats(store.rows["yarn"], 64)
    text = (folder / "results/README.md").read_text()
    assert "not measured yet" not in text
    assert "one setting for all. Chosen by nobody." in text
    assert "| `yarn`, trained, skipping |" in text
    for name in ("length", "position"):
        assert (folder / f"results/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not any((folder / "scratch").iterdir())  # checkpoints of finished cells are gone


def test_what_is_measured_is_what_the_package_measures(folder, monkeypatch):
    config = written(folder, [{"name": "original", "baseline": True}])
    row = launch(monkeypatch, folder, config, extend_page.write).rows["original"]
    model, tokenizer = load_model(str(folder / "model"), "float32"), load_tokenizer(str(folder / "model"))
    texts = measure.read_documents(row["spec"]["measure"], tokenizer)
    found = perplexity(model, texts, lengths=(16, 64), targets=15, window=16, stride=5)
    assert nats(row, 16) == pytest.approx(found[16].nats, abs=1e-4)
    assert nats(row, 64) == pytest.approx(found[64].nats, abs=1e-4)
    slid = summarise({k: tuple(v) for k, v in row["baselines"]["sliding"]["losses"].items()})
    assert slid.nats == pytest.approx(found.sliding.nats, abs=1e-6)
    assert row["positions"]["edges"] == [1, 16, 32, 48, 64]
    with torch.no_grad():
        ids = torch.stack([ids[-64:] for ids in texts.values()])
        logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    second = losses.view(len(ids), 63)[:, 15:31].mean()
    assert row["positions"]["nats"][1] == pytest.approx(float(second), abs=1e-4)


def test_switches_are_measured_before_after_and_trained(folder, learned, monkeypatch):
    cells = [
        {"name": "learned/original", "model": learned},
        {"name": "learned/alibi", "model": learned, "patches": [ALIBI]},
        {"name": "learned/alibi/trained, warm", "patches": [ALIBI], "train": {}, "strength_warmup": 0.5},
        {"name": "learned/rope", "model": learned, "patches": [YARN]},
    ]
    strengths = []
    set_strength = ap.set_alibi_strength
    monkeypatch.setattr(ap, "set_alibi_strength", lambda m, s: (strengths.append(s), set_strength(m, s))[1])
    store = launch(monkeypatch, folder, written(folder, cells), switch_page.write)
    assert strengths == [0.0, 1.0, 1.0]  # two steps, the first half of which rise; full ones are measured
    original = store.rows["learned/original"]["lengths"]
    assert "losses" in original["32"]
    assert "max_position_embeddings=32" in original["64"]["refused"]
    assert store.rows["learned/original"]["positions"] is None
    assert all("losses" in each for each in store.rows["learned/alibi"]["lengths"].values())
    assert "refused" in store.rows["learned/rope"]
    text = (folder / "results/README.md").read_text()
    assert "* `learned/original` at 64 tokens: " in text
    assert "* `learned/rope`: " in text
    assert "| `alibi`, trained, warm |" in text
    assert "over the first 50 % of the steps" in text


def test_a_stopped_training_goes_on_with_the_strength_that_it_had(folder, monkeypatch):
    cell = {"name": "rope/alibi/trained", "patches": [ALIBI], "train": {"save_every": 1}, "strength_warmup": 1.0}
    config = written(folder, [cell])
    whole = launch(monkeypatch, folder, config, switch_page.write).rows["rope/alibi/trained"]
    set_strength, seen = ap.set_alibi_strength, []

    def stop(model, strength):
        seen.append(strength)
        set_strength(model, strength)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ap, "set_alibi_strength", stop)
    with pytest.raises(KeyboardInterrupt):
        launch(monkeypatch, folder, config, switch_page.write, "--again")
    monkeypatch.setattr(ap, "set_alibi_strength", set_strength)
    again = launch(monkeypatch, folder, config, switch_page.write, "--again").rows["rope/alibi/trained"]
    assert seen == [0.0, 0.5]
    assert again["lengths"] == whole["lengths"]


def test_the_loop_says_which_step_comes(tmp_path):
    blocks = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    steps = []
    config = loop.TrainConfig(output=str(tmp_path), steps=3, batch_size=2)
    loop.train(model, blocks, loop.next_token_loss, config, before_step=steps.append)
    assert steps == [0, 1, 2]


def scored(per_document, refused=False):
    return {"refused": "no"} if refused else {"losses": {str(n): [10 * v, 10] for n, v in enumerate(per_document)}}


def add(store, cell, by_length, **more):
    environment = dict.fromkeys(("date", "cpu", "cores", "threads", "python", "code", "torch", "transformers"), "-")
    lengths = {str(n): found for n, found in zip((16, 32, 64), by_length, strict=True)}
    store.add(cell, {"lengths": lengths, "documents": 2, **more}, {**environment, "hf_attnpatch": "-", "load": 1.0})


def test_the_page_says_what_was_asked_and_whether_it_holds(folder):
    names = ("original", "yarn", "ntk", "good", "gone", "attention_sinks")
    made = study.read(written(folder, [{"name": name} for name in names]), [])
    store, cells = Store(folder / "results/metrics.jsonl"), {cell.name: cell for cell in made.cells}
    passkey = {"16": {"points": [0.0]}, "32": {"points": [0.0]}, "64": {"refused": "no"}}
    add(store, cells["original"], [scored([2, 4]), scored([3, 5]), scored([4, 6])], passkey=passkey)
    add(store, cells["yarn"], [scored([2, 4]), scored([2, 4]), scored([2.1, 4.1])])
    add(store, cells["ntk"], [scored([2, 4]), scored([2, 4]), scored([2.5, 4.5])])
    add(store, cells["good"], [scored([2, 4]), scored([2, 4]), scored([2.04, 4.02])])
    add(store, cells["gone"], [scored([2, 4]), scored([2, 4]), scored([], refused=True)])
    assert extend_page.best(made, store) == "good"
    text = extend_page.asked(made, store)
    assert "unpatched at 16, its trained context | +0.030 (+0.020 to +0.040) | at most +0.05 | yes |" in text
    assert "`yarn` at 64 | -0.070 (-0.080 to -0.060) | below 0 | yes |" in text
    assert "truncated to the last 16 | +0.030 (+0.020 to +0.040) | below 0 | **no** |" in text
    assert "sliding window of 16 (not asked) | - | below 0 | not measured |" in text
    add(store, cells["good"], [scored([2, 4]), scored([2, 4]), scored([2.1, 3.95])])
    assert "| yes, interval beyond it |" in extend_page.asked(made, store)
    assert page.losses(store, "gone", (16, 64))[1] == "refused"
    add(store, cells["attention_sinks"], [scored([2, 4]), scored([2, 4]), scored([1.9, 3.9])])
    text = extend_page.asked(made, store)  # a window is no longer context, so the best of the others is held as well
    assert text.index("`attention_sinks` at 64, nats above") < text.index("`good` at 64, nats above")


def test_a_switch_is_held_against_the_model_that_kept_its_positions_and_was_trained_so(folder):
    losses = {"original": 2.0, "original/trained": 1.9, "original/trained, lr 3": 1.8}
    losses |= {"alibi": 3.0, "alibi/trained, warm": 2.5, "alibi/trained, lr 3": 2.4}
    made = study.read(written(folder, [{"name": f"rope/{name}"} for name in losses]), [])
    store = Store(folder / "results/metrics.jsonl")
    for cell, loss in zip(made.cells, losses.values(), strict=True):
        add(store, cell, [scored([loss, loss])] * 3)
    switch_page.write(made, store, folder / "results")
    rows = (line for line in (folder / "results/README.md").read_text().splitlines() if line.startswith("| `"))
    last = {row.split("|")[1].strip(): [each.split("(")[0].strip() for each in row.split("|")[5:7]] for row in rows}
    assert last["`alibi`"] == ["+1.000", "-"]
    assert last["`alibi`, trained, warm"] == ["+0.500", "+0.600"]
    assert last["`alibi`, trained, lr 3"] == ["+0.400", "+0.600"]


def test_passkeys_that_nobody_finds_are_said_to_say_nothing(folder):
    passkey = {"depths": [0.5], "samples": 1}
    cells = [{"name": "original"}, {"name": "yarn"}]
    changes = {"measure": {"text": "-", "lengths": [16, 32, 64], "targets": 15, "passkey": passkey}}
    made = study.read(written(folder, cells, **changes), [])
    store = Store(folder / "results/metrics.jsonl")
    found = {"16": {"points": [0.0]}, "32": {"points": [0.0]}, "64": {"refused": "no"}}
    for cell in made.cells:
        add(store, cell, [scored([2, 4])] * 3, passkey=found)
    text = page.passkeys(made, store, "original")
    assert "No model finds one key" in text
    assert "| `yarn` | 0 | 0 | refused |" in text
    heat.passkeys(store, ["original", "yarn"], made.lengths, folder / "none.png")
    assert not (folder / "none.png").exists()  # an even field of zeros shows nothing
    within = {"16": {"points": [100.0], "mean": [100, 90, 100]}}
    add(store, made.cells[0], [scored([2, 4])] * 3, passkey={**found, **within})
    add(store, made.cells[1], [scored([2, 4])] * 3, passkey={**found, "64": {"points": [50.0]}})
    text = page.passkeys(made, store, "original")
    assert "No model finds" not in text
    assert "| `original` | **100** (90 to 100): 100 | 0 | refused |" in text
    assert page.by_passkey(made, store, "none") == ["yarn", "original"]
    assert page.by_passkey(made, store, "original") == ["original", "yarn"]
    heat.passkeys(store, ["original", "yarn"], made.lengths, folder / "passkey.png")
    assert (folder / "passkey.png").stat().st_size > 5_000


def test_a_study_is_checked_before_it_runs(folder):
    for cells, message in (
        ([{"name": "a"}, {"name": "a"}], "two have the name 'a'"),
        ([{"name": "a", "train": {}, "strength_warmup": 0.5}], "a: strength_warmup is of ALiBi's slopes"),
        ([{"name": "a", "strength_warmup": 0.5}], "belong to a training"),
        ([{"name": "a", "train": {"step": 1}}], "a: train: unknown step"),
        ([{"name": "a", "data": {"block": 1}}], "belong to a training"),
        ([{"name": "a", "train": {}, "strength_warmup": 2.0}], "share of the steps"),
    ):
        with pytest.raises(SettingsError, match=message):
            study.read(written(folder, cells), [])
    with pytest.raises(SettingsError, match="^a: .*patch 'nothing' does not exist"):
        study.read(written(folder, [{"name": "a", "patches": [{"patch": "nothing"}]}]), [])
    with pytest.raises(SettingsError, match="unknown other"):
        study.read(written(folder, [{"name": "a"}], other=1), [])


def test_a_model_that_is_not_there_fails_its_cell_only(folder, monkeypatch, capfd):
    cells = [{"name": "a", "model": str(folder / "nowhere")}, {"name": "b"}]
    with pytest.raises(SettingsError, match="1 cells failed: a"):
        launch(monkeypatch, folder, written(folder, cells), switch_page.write)
    assert "FAILED: a: " in capfd.readouterr().out
    assert list(Store(folder / "results/metrics.jsonl").rows) == ["b"]


@pytest.mark.parametrize("name", ["extend_context_embedded", "extend_context_smollm2", "switch_positions"])
def test_the_configurations_that_ship_can_be_read(name):
    made = study.read(str(ROOT / f"recipes/configs/{name}.yaml"), [])
    for cell in made.cells:
        assert "train" not in cell.spec or "heldout" not in cell.spec["data"]["source"]  # never on what is measured
        assert cell.spec["measure"]["targets"] < made.lengths[0]
        assert cell.digest == type(cell)(cell.name, cell.kind, json.loads(json.dumps(cell.spec))).digest


def test_a_warm_up_without_alibi_is_refused(folder):
    model = load_model(str(folder / "model"), "float32")
    with pytest.raises(ap.AttnPatchError, match="no ALiBi"):
        worker.strength_schedule(model, 0.5, 10)(0)
