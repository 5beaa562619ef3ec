"""An uptraining's configuration: what is wrong in it is named before anything is loaded."""

import json
from pathlib import Path

import pytest
import yaml
from uptraining import LORA, launch, settings, written

from recipes import job as jobs
from recipes import uptrain

ROOT = Path(__file__).resolve().parents[2]
REFINED = {"patch": "grouped_query", "num_kv_heads": 2, "method": "refined"}
TEXT = {"source": "some/dataset"}


@pytest.mark.parametrize("section", ["data", "heldout", "calibration"])
@pytest.mark.parametrize("source", ["missing.txt", "blank.txt"])
def test_missing_and_empty_text_are_errors_before_a_model_is_loaded(folder, monkeypatch, section, source):
    (folder / "blank.txt").write_text(" \n")
    monkeypatch.setattr(uptrain, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="no such file or folder|found no text"):
        launch(monkeypatch, written(folder, **{section: {"source": str(folder / source)}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, r"unknown modle; choose from calibration, data, dtype, heldout, .*patches, .*trainable"),
        ({"heldout": {"window": 2}}, "heldout: unknown window; choose from .*windows"),
        ({"train": {"learning_rate": 1}}, "train: unknown learning_rate; choose from .*lr"),
        ({"loss": "kl"}, "loss: 'kl' does not exist; choose from 'distillation', 'layerwise_dis.*', 'cross_entropy'"),
        ({"trainable": "mlp"}, "trainable: 'mlp' does not exist; choose from 'attention', 'all', 'lora'"),
        ({"trainable": "lora"}, "belong together"),
        ({"lora": {"r": 4}}, "belong together"),
        ({"trainable": "lora", "lora": {"rank": 4}}, "lora: unknown rank; choose from .*target_modules"),
        ({"patches": []}, r"expected a list such as \[\{patch: grouped_query"),
        (
            {"patches": [{"patch": "grouped"}]},
            "patch 'grouped' does not exist .did you mean grouped_query.*; choose from: .*grouped_query",
        ),
        (
            {"patches": [{"patch": "grouped_query", "heads": 2}]},
            "no field heads; its fields are: num_kv_heads, method",
        ),
        ({"patches": [REFINED]}, "method 'refined' is fitted on text; add a section `calibration"),
        ({"patches": [{**REFINED, "calibration": "x"}]}, "grouped_query.calibration: name the text in a section"),
        (
            {"patches": [{"patch": "flash", "backend": "sdpa"}], "calibration": TEXT},
            "none of the patches is fitted on text",
        ),
        ({"calibration": {**TEXT, "sequences": 0}}, "sequences: expected at least 1, found 0"),
        ({"calibration": {**TEXT, "own": -1}}, "calibration.own: expected 0 or more blocks .* found -1"),
        ({"calibration": {**TEXT, "source": "self", "own": 2}}, "found 2 beside source 'self'; with source `self`"),
        ({"calibration": {**TEXT, "sequence": 8}}, "calibration: unknown sequence; choose from .*sequences"),
        (
            {"patches": [{**REFINED, "refine_seconds": 1}], "calibration": TEXT, "train": {"save_every": 1}},
            "a clock stops",
        ),
        ({"processes": "two"}, "processes: expected a whole number, found 'two'"),
        ({"train": {"log_every": 0}}, "train.log_every: 0; wanted 1 or more"),
        ({"train": {"warmup": -1}}, "train.warmup: -1; wanted 0 or more"),
        ({"data": {"source": "x", "block": 1}}, "data.block: 1; wanted 2 or more"),
        ({"heldout": {"source": "x", "block": 1}}, "heldout.block: 1; wanted 2 or more"),
        ({"heldout": {"source": "x", "during": 0}}, "heldout.during: 0; wanted 1 or more"),
    ],
)
def test_a_wrong_configuration_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        jobs.read(written(folder, **changes))


def test_defaults_follow_what_learns(folder):
    plain = settings(folder)
    del plain["train"]["lr"]
    for trainable, lr in (("attention", 1e-4), ("all", 2e-5), ("lora", 1e-4)):
        lora = {"lora": LORA} if trainable == "lora" else {}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump({**plain, "trainable": trainable, **lora}))
        job = jobs.read(path, ["train.steps=100"])
        assert (job.train.lr, job.train.warmup, job.train.betas) == (lr, 2, (0.9, 0.95))
        assert job.heldout.block == job.data.block == 16
        assert json.dumps(jobs.plain(job))


def test_every_shipped_configuration_can_be_read():
    others = ("demo", "pretrain", "extend_context", "switch_positions", "train_recurrent")  # scripts that read more
    paths = [path for path in (ROOT / "recipes/configs").glob("*.yaml") if not path.name.startswith(others)]
    assert paths
    for path in paths:
        assert jobs.read(path).patches


@pytest.mark.parametrize(("content", "message"), [(b"train: [1", "write it as YAML"), (b"\xff\xfe", "not UTF-8")])
def test_a_file_that_is_no_yaml_is_named(tmp_path, content, message):
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(jobs.SettingsError, match=message):
        jobs.read(tmp_path / "job.yaml")


def test_an_override_that_is_no_yaml_is_named(folder):
    with pytest.raises(jobs.SettingsError, match=r"--set train.steps=\[1: .*write it as YAML"):
        jobs.read(written(folder), ["train.steps=[1"])
