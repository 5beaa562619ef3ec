"""Text that patches are fitted on: drawn with a seed, part of what a run is, and its damage written down."""

import json

import pytest
import torch
from uptraining import LORA, launch, outcome, weights, written

import hf_attnpatch as ap
from recipes import calibration, uptrain
from recipes.calibration import CalibrationConfig
from recipes.data import DataConfig, DataError, load_blocks

REFINED = {"patch": "grouped_query", "num_kv_heads": 2, "method": "refined", "refine_steps": 3}


def config(folder, **changes):
    values = {"source": str(folder / "train"), "block": 16, "cache": str(folder / "cache"), "sequences": 8}
    return CalibrationConfig(**{**values, **changes})


def section(folder, **changes):
    return {"source": str(folder / "train"), "cache": str(folder / "cache"), "sequences": 8, **changes}


def test_blocks_are_drawn_with_the_seed_and_none_twice(folder, tokenizer):
    blocks = load_blocks(DataConfig(source=str(folder / "train"), block=16, cache=str(folder / "cache")), tokenizer)
    everything = {tuple(blocks[index]["input_ids"].tolist()) for index in range(len(blocks))}
    first = calibration.load(config(folder), tokenizer)
    again, other = calibration.load(config(folder), tokenizer), calibration.load(config(folder, seed=1), tokenizer)
    assert first.ids.shape == (8, 16)
    assert first.ids.dtype == torch.int64
    assert torch.equal(first.ids, again.ids)
    assert {tuple(row) for row in first.ids.tolist()} <= everything
    assert not torch.equal(first.ids, other.ids)
    assert first.identity() == again.identity() != other.identity()
    whole = calibration.load(config(folder, sequences=len(blocks)), tokenizer).ids
    assert sorted(map(tuple, whole.tolist())) == sorted(
        tuple(blocks[i]["input_ids"].tolist()) for i in range(len(blocks))
    )
    assert len(list((folder / "cache").iterdir())) == 1  # one cache, shared with the training text


def test_too_little_text_is_an_error(folder, tokenizer):
    with pytest.raises(DataError, match=r"found \d+ blocks of 16 tokens, wanted 5000; give more"):
        calibration.load(config(folder, sequences=5000), tokenizer)


def test_only_patches_that_take_text_get_it(folder, tokenizer):
    text = calibration.load(config(folder), tokenizer)
    flash, grouped = ap.Flash(backend="sdpa"), ap.GroupedQuery(num_kv_heads=2, method="calibrated")
    given = text.give([flash, grouped])
    assert given[0] is flash
    assert given[1].calibration is text.ids
    assert given[1].to_record() == grouped.to_record()


def test_the_model_writes_text_alone_or_beside_a_source(folder, tokenizer):
    grouped = ap.GroupedQuery(num_kv_heads=2, method="calibrated")
    alone = calibration.load(config(folder, source="self", seed=3), tokenizer)
    own = ap.OwnText(sequences=8, length=16, seed=3)
    assert alone.give([grouped])[0].calibration == own
    beside = calibration.load(config(folder, own=4), tokenizer)
    text, written_too = beside.give([grouped])[0].calibration
    assert text is beside.ids
    assert written_too == ap.OwnText(sequences=4, length=16)
    plain = calibration.load(config(folder), tokenizer)
    found = [alone.identity(), beside.identity(), plain.identity()]
    assert json.loads(json.dumps(found)) == found
    assert len({json.dumps(each) for each in found}) == 3


def test_a_model_calibrated_on_its_own_text_is_trained(folder, monkeypatch):
    patch = {**REFINED, "refine_steps": 1, "fallback": "principal"}
    launch(monkeypatch, written(folder, patches=[patch], calibration={"source": "self", "sequences": 2}))
    assert json.loads((folder / "out/metrics.json").read_text())["job"]["calibration"]["source"] == "self"


@pytest.mark.parametrize("method", ["calibrated", "refined"])
def test_a_fitted_patch_is_the_one_of_the_library_and_its_damage_lies_beside(folder, monkeypatch, tokenizer, method):
    patch = {**REFINED, "method": method}
    launch(monkeypatch, written(folder, patches=[patch], calibration=section(folder), trainable="all"))
    metrics, _ = outcome(folder / "out")
    assert metrics["job"]["calibration"]["sequences"] == 8
    assert metrics["job"]["calibration"]["block"] == 16
    damage = json.loads((folder / "out/damage.json").read_text())
    assert damage["method"] == method
    assert len(damage["layers"]) == 2
    assert method in damage["layers"][0]["gaps"] or method == "calibrated"
    assert (folder / "out/damage.png").read_bytes().startswith(b"\x89PNG")
    model = uptrain.load_model(str(folder / "model"), "float32")
    ids = calibration.load(config(folder), tokenizer).ids
    ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method=method, refine_steps=3, calibration=ids))
    from recipes.evaluate import heldout_windows
    from recipes.job import HeldoutConfig

    windows = heldout_windows(HeldoutConfig(source=str(folder / "heldout"), block=16, windows=3), tokenizer)
    by_hand = ap.evaluation.mean_loss(model, windows)
    assert metrics["scores"]["converted"]["nats"] == pytest.approx(by_hand.nats, abs=1e-6)


@pytest.mark.usefixtures("no_reload")
def test_a_calibrated_run_resumes_bit_equal_and_on_no_other_text(folder, monkeypatch):
    changes = {"patches": [REFINED], "calibration": section(folder)}
    training = {"steps": 4, "save_every": 2}
    launch(monkeypatch, written(folder, **changes, train=training | {"output": str(folder / "whole")}))
    launch(monkeypatch, written(folder, **changes, train=training))
    for late in (folder / "out/checkpoints").glob("step_*4"):
        late.rename(folder / "late")  # as if killed between step 2 and step 4
    with pytest.raises(ValueError, match="the settings changed .*calibration"):
        launch(
            monkeypatch,
            written(folder, **changes | {"calibration": section(folder, seed=1)}, train=training),
            "--resume",
        )
    launch(monkeypatch, written(folder, **changes, train=training), "--resume")
    whole, resumed = weights(folder / "whole"), weights(folder / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for left, right in zip(outcome(folder / "whole")[1], outcome(folder / "out")[1], strict=True):
        assert left | {"seconds": 0} == right | {"seconds": 0}


def test_lora_with_full_rank_keys_and_values_goes_on_top_of_refined_heads(folder, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    changes = {"patches": [REFINED], "calibration": section(folder), "trainable": "lora", "lora": LORA}
    launch(monkeypatch, written(folder, **changes, train={"lr": 0.05}))
    metrics, _ = outcome(folder / "out")
    assert metrics["reload"]["max_difference"] == 0
    converted, merged = weights(folder / "out", "converted"), weights(folder / "out")
    change = {name: merged[name] - converted[name] for name in merged if "layers.0" in name}
    rank = {
        name.split(".")[-2]: int(torch.linalg.matrix_rank(each)) for name, each in change.items() if each.dim() == 2
    }
    assert rank["q_proj"] == rank["o_proj"] == rank["up_proj"] == LORA["r"]
    assert rank["k_proj"] == rank["v_proj"] == 16  # two heads of 8, full rank
    assert rank["gate_proj"] == rank["down_proj"] == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "out/converted")
    ids = torch.arange(20)[None]
    apart = PeftModel.from_pretrained(base, folder / "out/adapter").eval()(ids).logits
    together = AutoModelForCausalLM.from_pretrained(folder / "out/model").eval()(ids).logits
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)
