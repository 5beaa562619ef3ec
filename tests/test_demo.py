"""The demo, cut to a few steps: one page that needs nothing, one progress display, nothing else on the screen."""

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from comparing import chromium

from hf_attnpatch import demo, embedded, progress
from hf_attnpatch.errors import AttnPatchError

QUICK = ["train.steps=4", "train.batch_size=2", "train.warmup=0", "train.eval_every=2", "threads=1"]
QUICK += ["heldout.documents=2", "data.block=64", "heldout.block=64"]
QUICK += [f"{part}.source=embedded/uptrain/prose" for part in ("data", "calibration")]  # few documents to read
QUICK += ["heldout.source=embedded/evaluation/docs"]
QUICK += ["calibration.sequences=16", "calibration.block=64"]
QUICK += ["patches=[{patch: grouped_query, num_kv_heads: 2, method: refined, refine_steps: 2}]"]
QUICK += ["show.context=128", "show.texts=2", "show.speed_context=64", "show.speed_tokens=4", "show.written=4"]
QUICK += ["show.long=768", "show.long_documents=1", "show.long_bins=3"]

pytestmark = pytest.mark.skipif(not (embedded.path() / "config.json").is_file(), reason="the embedded model is absent")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of a demo, and what it said; matplotlib is not there."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "without/matplotlib").mkdir(parents=True)
    (folder / "without/matplotlib/__init__.py").write_text("raise ImportError('not here')")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "without"), before]))
    try:
        with progress.spoken(True):
            said = demo.run(folder / "out", overrides=QUICK)
    finally:
        os.environ["PYTHONPATH"] = before
    return folder / "out", said


def test_what_it_says_is_what_it_found(shown):
    folder, said = shown
    found = json.loads((folder / "metrics.json").read_text())
    for stage, heads in (("original", 8), ("averaged", 2), ("principal", 2), ("refined", 2), ("uptrained", 2)):
        score = found["scores"][stage]
        assert f"{score['nats']:.3f}" in said
        assert score["cache_bytes_per_token"] == 6 * 2 * heads * 32 * 4  # layers, keys and values, heads, size, float32
    held = found["decoding"]["cache_bytes"]
    assert held["original"] == 4 * held["refined"] > 0
    assert found["reload"] == {"max_difference": 0.0, "stock": True, "attention": "sdpa"}
    assert "stock transformers loads the result: largest difference 0" in said
    assert found["longer"]["beyond"]["self_extend"] < found["longer"]["beyond"]["original"]
    assert str(folder / "demo.html") in said
    assert (folder / "model/model.safetensors").is_file()


def test_the_page_needs_nothing_but_itself(shown):
    folder, _ = shown
    page = (folder / "demo.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "prefers-color-scheme: dark" in page
    for drawn in [*re.findall(r"<svg .*?</svg>", page, re.DOTALL), (folder / "demo.svg").read_text("utf-8")]:
        assert ElementTree.fromstring(drawn).get("aria-label")
    found = json.loads((folder / "metrics.json").read_text())
    assert set(found["texts"]["written"]) == {"original", "averaged", "refined", "uptrained"}


def test_a_browser_has_nothing_to_say_of_it(shown, tmp_path):
    browser = chromium.find()
    if browser is None:
        pytest.skip("no Chromium here")
    page = (shown[0] / "demo.html").as_uri()
    flags = ("--enable-logging=stderr", "--window-size=380,900", "--dump-dom")
    done = chromium.run(browser, tmp_path / "profile", *flags, page)
    assert "What one line does to a model" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_a_second_demo_replaces_the_first_and_a_failure_is_told_in_its_last_words(shown):
    with pytest.raises(AttnPatchError, match=r"did not finish: demo.py: train: unknown step; choose from .*log\.txt"):
        demo.run(shown[0], overrides=["train.step=1"])


def test_only_the_progress_is_on_the_screen(tmp_path, capfd, monkeypatch):
    worker = tmp_path / "demo.py"
    worker.write_text(
        "import sys, json; print('noise', file=sys.stderr); tell = lambda **what: print(json.dumps(what), flush=True)\n"
        "tell(stages=[['one', 1], ['two', 2]]); tell(begins=0); tell(begins=1); tell(done='found')"
    )
    monkeypatch.setattr(demo, "recipes", lambda: tmp_path)
    with progress.spoken(True):
        assert demo.run(tmp_path / "out").startswith("found\n")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"\[1/2\] one\n\[2/2\] two, some 0:0\d left\n", printed.err)
    assert Path(tmp_path / "out/log.txt").read_text() == "noise\n"
    with progress.spoken(False):
        demo.run(tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_the_time_that_is_left_follows_the_machine(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stages = progress.Stages([("one", 10.0), ("two", 20.0), ("three", 30.0)])
    assert stages.left() == 60.0
    now[0] = 20.0  # the first took twice as long as it was said to
    stages.begin(1)
    assert stages.left() == 100.0
    now[0] = 50.0
    assert stages.left() == 70.0
    now[0] = 90.0  # longer than it should: the rest is still to come
    assert stages.left() == 61.0


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CONFIG", "none.yaml")
    with pytest.raises(AttnPatchError, match="the recipes are not in this installation"):
        demo.run(tmp_path)
