"""The demo, cut to two steps."""

import json

import pytest

from hf_attnpatch import demo, embedded
from hf_attnpatch.errors import AttnPatchError, MissingExtra

QUICK = ["train.steps=2", "train.batch_size=2", "train.warmup=0", "train.eval_every=0", "threads=1"]
QUICK += ["heldout.documents=2", "heldout.windows=1", "data.block=64", "heldout.block=64"]

needs_model = pytest.mark.skipif(not (embedded.path() / "config.json").is_file(), reason="the embedded model is absent")


@needs_model
def test_it_ends_with_a_table_and_what_the_table_says_is_in_the_folder(tmp_path, capfd):
    demo.run(tmp_path / "demo", overrides=QUICK)
    printed = capfd.readouterr().out
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    for words in ("which nothing here is trained on", "original", "converted", "uptrained", "cache (bytes/token)"):
        assert words in printed
    for stage, heads in (("original", 8), ("converted", 2), ("uptrained", 2)):
        score = metrics["scores"][stage]
        assert f"{score['nats']:.4f}" in printed
        assert score["cache_bytes_per_token"] == 6 * 2 * heads * 32 * 4  # layers, keys and values, heads, size, float32
    assert "stock transformers reload: max difference 0" in printed
    for name in ("loss.png", "comparison.png", "model/model.safetensors"):
        assert (tmp_path / "demo" / name).is_file()
    demo.run(tmp_path / "demo", overrides=QUICK)  # a second time into the same folder


@needs_model
def test_a_failure_of_the_recipe_is_the_demos(tmp_path, capfd):
    with pytest.raises(AttnPatchError, match="exit code 1"):
        demo.run(tmp_path / "demo", overrides=["train.step=1"])
    assert "uptrain.py: train: unknown step; choose from" in capfd.readouterr().err


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"hf_attnpatch\[recipes\]"):
        demo.run(tmp_path)
    monkeypatch.setattr(demo, "CONFIG", "none.yaml")
    with pytest.raises(AttnPatchError, match="the recipes are not in this installation"):
        demo.run(tmp_path)
